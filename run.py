"""One Hydra job = one cell of a table: ``python run.py method=lors sparsity=0.5``; see ``python run.py
--help``.

This file only composes the config and decides which process runs it. The suite itself is imported once Hydra
has parsed the command line, so that ``--help`` and a misspelt name answer at once. Under ``-m`` every job gets
a process of its own, see `harness.sweep`.

Exit codes: 0 the run finished; 1 it failed (the result file says why), or a job of a sweep did; 2 a bad
value.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Thread

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.launch import CHILD, run_launcher, verdict
from hydra_plugins.block_sweeper import SINCE, as_list, is_local

CONF = Path(__file__).resolve().parent / "conf"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
# What the user set, before main() sets it for Hydra.
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Of the output of a job that ended without a result, so many lines are shown.
LAST_LINES = 20
LONGEST = 2000  # characters of an error
# Keys of a method that say what it is; its file says that.
PARTS = ("name", "version", "peft")
CONSTRUCTION = ("_target_", "_partial_", "_convert_", "_args_", "_recursive_")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> int | None:
    """Run one composed config here; in a sweep or with a launcher, in a process of its own."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return run_in_sweep(cfg, hydra_config)
    if CHILD in os.environ or "WORLD_SIZE" in os.environ:
        code = run_here(cfg)
    elif OmegaConf.select(cfg, "only") is not None:
        code = complain(f"only={cfg.only}: must be null without -m; it chooses among the jobs of a sweep")
    elif hydra_config.sweeper.params or hydra_config.sweeper.blocks:
        name = hydra_config.runtime.choices.get("experiment")
        code = complain(f"experiment={name}: is a sweep; must be run with -m, as in run.py -m experiment={name}")
    elif as_list(OmegaConf.select(cfg, "launch.arguments")):
        code = look_ahead(cfg) or start_afresh(cfg, hydra_config)[0]
    else:
        code = run_here(cfg)
    if code:
        sys.exit(code if code > 0 else FAILED)


def run_here(cfg: DictConfig) -> int:
    """Execute the run in this process and return the exit code."""
    if "HF_HUB_OFFLINE" not in os.environ and is_local(cfg):
        # Read when the libraries are imported. Without it some of them knock at the Hub for files that lie
        # here.
        os.environ["HF_HUB_OFFLINE"] = "1"
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: the first process has the bars
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP says of most methods that it looks for nothing
    if SINCE in os.environ and CHILD in os.environ:
        Thread(target=end_with_the_sweep, daemon=True).start()
    from harness.errors import BadInput
    from harness.processes import let_others_speak
    from harness.run import execute
    from harness.store import Busy
    from harness.sweep import BUSY

    if not gc.get_freeze_count():  # what the imports have made is no garbage; several times in a run it was looked at
        gc.freeze()
        atexit.register(gc.unfreeze)  # for libraries that take themselves down at the end
    try:
        result = execute(cfg, since=since())
    except BadInput as error:
        if TRACEBACKS:
            raise
        let_others_speak()
        return complain(as_given(str(error)))
    except Busy:
        return BUSY
    return 0 if result["status"] == "ok" else FAILED


def look_ahead(cfg: DictConfig) -> int:
    """Check the config and its inputs, as a launcher says of a bad one only how its process has ended."""
    from harness.config import resolve
    from harness.errors import BadInput
    from harness.inputs import read_inputs
    from harness.method_from_config import build_method

    try:
        cfg = resolve(cfg)
        read_inputs(cfg, build_method(cfg))
    except BadInput as error:
        return complain(as_given(str(error)))
    return 0


def run_in_sweep(cfg: DictConfig, hydra_config: DictConfig) -> int:
    """Run one job of a sweep, unless there is nothing to do, and return its exit code.

    What it prints is shown only if it ends without a result; the line of the sweep says the rest.
    """
    from harness.sweep import BUSY, exit_code_without_run

    code = exit_code_without_run(cfg, since())
    if code is not None:
        return code
    if cfg.mode == "simulate":  # it allocates nothing that could leak into the next job
        with redirect_stdout(StringIO()):
            return run_here(cfg)
    code, output = start_afresh(cfg, hydra_config, in_sweep=True)
    if code != BUSY and exit_code_without_run(cfg, since()) is None:
        ending = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        lines = [f"job {hydra_config.job.num} has no result: {ending}", *output.splitlines()[-LAST_LINES:]]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
    return code


def start_afresh(cfg: DictConfig, hydra_config: DictConfig, in_sweep: bool = False) -> tuple[int, str]:
    """Run the job in a new process through ``launch``; its exit code, and in a sweep what it has printed.

    Memory peaks and caches of one job would otherwise leak into the next.
    """
    folders = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    command = [sys.executable, *as_list(cfg.launch.arguments), str(CONF.parent / "run.py")]
    command += [f"--config-dir={folder}" for folder in folders] + list(hydra_config.overrides.task)
    environment = {**os.environ, CHILD: "1", "HYDRA_FULL_ERROR": "1" if TRACEBACKS else "0"}
    if not in_sweep:
        return run_launcher(command, environment), ""
    # Nothing is ever written to the standard input: that it is closed tells the job that the sweep is gone.
    read_end, write_end = os.pipe()
    try:
        run = subprocess.run(
            command, env=environment, check=False, stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    result = verdict(run.stdout, run.returncode)
    return result.code, result.shown.decode(errors="replace")


def end_with_the_sweep() -> None:
    """Wait until the process that started this one is gone, however it ended, and end this one.

    The same command may be running again, and a job of the killed sweep would disturb its measurements.
    """
    os.read(sys.stdin.fileno(), 1)
    os._exit(FAILED)


def since() -> int | None:
    """When the sweep began that this process belongs to."""
    return int(os.environ[SINCE]) if SINCE in os.environ else None


def explain(error: Exception) -> str:
    """One line for an error of Hydra: the key, the value, and what is allowed."""
    text, cause = str(error), error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: must be one of {', '.join(error.options)}"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: must be YAML ({error.problem})"
    if isinstance(error, UnicodeDecodeError):
        return f"{file_of(error.object)}: must be UTF-8 text ({error.reason})"
    if isinstance(error, InstantiationException):
        return f"{error.args[0].rpartition('full_key: ')[2]}: {cause}"
    if text.startswith("Config group override must be"):
        group = next((name for name in GROUPS if given(name) != name), None)
        return f"{given(group)}: must be one of {', '.join(GROUPS[group])}" if group else f"{text}: must be name=value"
    merged = re.match("Error merging override (.*)", text, re.DOTALL)
    if merged:
        here = "a list" if getattr(cause, "object_type", dict) is list else "a mapping"
        return f"{merged[1]}: must be {here}"
    unknown = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']*)'", text)
    if unknown:
        inside = str(getattr(cause, "full_key", ""))
        return no_such_key(inside if inside.startswith(f"{unknown[1]}.") else unknown[1])
    return " ".join(text.partition("Config search path")[0].split())


def file_of(content: bytes) -> str:
    """Which of the user's config files has this content."""
    folders = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("--config-dir=")]
    files = (file for folder in folders for file in Path(folder).rglob("*.yaml"))
    return next((str(file) for file in files if file.read_bytes().startswith(content)), "a config file")


def no_such_key(key: str) -> str:
    """What to say of a key that the composed config does not have."""
    by_key = keys_by_option()
    if by_key.get(key):
        group = key.partition(".")[0]
        have = " or ".join(f"{group}={option}" for option in sorted(by_key[key]))
        return f"{given(key)}: no such key here; {have} has it"
    section, _, last = key.rpartition(".")
    chosen = {option for group in GROUPS for option in (given(group).partition("=")[2], default_option(group))}
    names = [name for name, options in by_key.items() if not options or chosen & set(options)]
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    close = [beside[name] for name in difflib.get_close_matches(last, beside, n=1)]
    close += [name for word, name in beside.items() if "".join(part[:1] for part in word.split("_")) == last]
    close += difflib.get_close_matches(key, [*names, *GROUPS], n=1)
    hint = f"did you mean {close[0]}?" if close else "`python run.py --help` lists the names"
    return f"{given(key)}: no such key; {hint}"


def default_option(group: str) -> str | None:
    """The option of a group that ``conf/config.yaml`` chooses."""
    defaults = [entry for entry in OmegaConf.load(CONF / "config.yaml").defaults if OmegaConf.is_dict(entry)]
    return next((entry[group] for entry in defaults if group in entry), None)


def given(key: str) -> str:
    """How the command line sets a key; the key alone if it does not."""
    return next((argument for argument in sys.argv[1:] if argument.lstrip("~+").startswith(f"{key}=")), key)


def keys_by_option() -> dict[str, list[str]]:
    """Every dotted key of ``conf``, with the options of its group that have it (none for those outside of groups)."""
    found: dict[str, list[str]] = {}

    def walk(node: object, prefix: str, option: list[str]) -> None:
        for key in node if isinstance(node, DictConfig) and not node._is_none() else ():
            if not str(key).startswith("_") and key not in ("defaults", "hydra"):
                found.setdefault(f"{prefix}{key}", []).extend(option)
                walk(node._get_node(key), f"{prefix}{key}.", option)  # without resolving interpolations

    walk(OmegaConf.load(CONF / "config.yaml"), "", [])
    for file in CONF.glob("*/*.yaml"):
        if file.parent.name not in ("experiment", "hydra"):
            walk(OmegaConf.load(file), f"{file.parent.name}.", [file.stem])
    return found


def as_given(message: str) -> str:
    """A message about ``key=value`` with the value as the command line has it."""
    from harness.refusals import as_written

    key, _, rest = message.partition("=")
    shown, colon, reason = rest.partition(": ")
    if not colon or given(key) == key:
        return message
    value = OverridesParser.create().parse_override(given(key)).value()
    written = given(key).lstrip("~+")
    return f"{written}: {reason}" if shown in (str(value), repr(value), as_written(value)) else message


def complain(message: str) -> int:
    """Print one line, whatever is in the message."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split(" ")))
    print(f"error: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}", file=sys.stderr)
    return BAD_INPUT


def is_sweep() -> bool:
    return any(flag in sys.argv for flag in ("-m", "--multirun"))


def in_order(arguments: list[str]) -> list[str]:
    """Flags first, then overrides: argparse, which reads them for Hydra, takes them in this order only.

    Raises:
        ValueError: There is no such flag, or an override that no run can have.
    """
    known = get_args_parser()._option_string_actions
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in known:
            raise ValueError(f"{argument}: no such flag; a value is set as name=value, without dashes")
        flags.append(argument)
        if known[flag].nargs is None:
            if not equals:  # its value is the next word
                flags.append(value := next(rest, ""))
            if (known[flag].choices and value not in known[flag].choices) or not value:
                allowed = ", ".join(known[flag].choices or ["a value"])
                raise ValueError(f"{flag} {value}: must be followed by {allowed}")
        elif equals:
            raise ValueError(f"{argument}: must be {flag} without a value")
    check_overrides(overrides)
    return flags + overrides


def check_overrides(arguments: list[str]) -> None:
    """Refuse what Hydra would take, or explain in several lines.

    Of a value that is given twice the last one counts, as anywhere. Two axes of a sweep, or two options of a group, are
    a mistake.

    Raises:
        ValueError: The first one.
    """
    parser, seen = OverridesParser.create(), {}
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except Exception as error:  # of the grammar, or of Python: a number of thousands of digits
            message = "must be name=value, with quotes around special characters"
            raise ValueError(f"{argument or repr(argument)}: {message}") from error
        key, several = override.key_or_group, override.is_sweep_override()
        if override.is_delete() and not key.startswith("hydra"):
            raise ValueError(f"{argument}: must stay; a run needs every key")
        if not key or override.package is not None:
            raise ValueError(f"{argument}: must be name=value, and the name one of those in `python run.py --help`")
        if several and not is_sweep():
            raise ValueError(f"{argument}: must be one value without -m; a list of values has brackets, [a,b]")
        if several and key == "experiment":
            raise ValueError(f"{argument}: must be one; every preset is a sweep of its own")
        if key in GROUPS and (override.is_add() or override.is_force_add()):
            raise ValueError(f"{argument}: must be {argument.lstrip('+')}; every group has an option already")
        if key in seen and (several or seen[key] or key in GROUPS):
            raise ValueError(f"{argument}: must be there once; {key} is set twice")
        seen[key] = several
        check_method(argument, override)


def check_method(argument: str, override: Override) -> None:
    """Refuse to make another method under the name of this one: its results would count as those of this one.

    Raises:
        ValueError: The override does.
    """
    for key in leaves(override.key_or_group, override._value):
        group, _, part = key.partition(".")
        if group == "method" and (part in PARTS or part.rpartition(".")[2] in CONSTRUCTION):
            where = "conf/method, or in that folder of --config-dir"
            raise ValueError(f"{argument}: must stay as its file says; another method is another file in {where}")


def leaves(key: str, value: object) -> Iterator[str]:
    """The dotted keys that a value sets to something that is no mapping."""
    if not isinstance(value, dict):
        yield key
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from leaves(f"{key}.{name}", item)


def main() -> int:
    """Run the command line and return the exit code."""
    # Makes Hydra raise its errors; else it prints them over several lines and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = in_order(sys.argv[1:])
        job()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        if TRACEBACKS:
            raise
        return complain(explain(error))
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
