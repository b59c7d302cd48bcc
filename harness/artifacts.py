"""The folders that a run leaves for others to load: base, adapter and merged model, each with its card."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.files import write_json
from harness.model_card import ADAPTER, BASE, MERGED, base_of, write_card
from harness.processes import from_first
from harness.store import RunStore
from harness.weights import base_format
from lors.quantized_file import save_quantized

__all__ = ["Artifacts"]


class Artifacts:
    """What a run leaves in ``store`` besides ``result.json``, whose ``artifacts`` name it."""

    def __init__(
        self, cfg: DictConfig, store: RunStore, tokenizer: PreTrainedTokenizerBase | None, result: dict[str, Any]
    ) -> None:
        self.cfg = cfg
        self.store = store
        self.tokenizer = tokenizer
        self.result = result
        self._cards: dict[str, dict[str, Any]] = {}  # arguments of `write_card`

    def add_base(self, model: PreTrainedModel) -> None:
        """Write the model that is fine-tuned, as it is before."""
        from_first(partial(self.save, model, BASE))
        self._note(BASE)

    def add_adapter(self, adapted: PeftModel) -> None:
        """Write the adapter, which names a base that others can have in place of a folder of the cache."""
        config = adapted.peft_config[adapted.active_adapter]

        def write() -> None:
            base = base_of(self.cfg, self.result["provenance"])
            with self.store.artifact(ADAPTER) as folder:
                adapted.save_pretrained(folder)
                file = folder / "adapter_config.json"
                written = json.loads(file.read_text(encoding="utf-8"))
                write_json(file, written | {"base_model_name_or_path": base.path, "revision": base.revision})
                self._write_card(ADAPTER, folder, peft=config)  # in place of that of PEFT, which names the cache

        from_first(write)
        self._note(ADAPTER, peft=config)

    def note_merged(self, state: str) -> None:
        """Take the plain model of an end state, saved as ``merged``, into the result."""
        self._note(MERGED, state=state)

    def save(self, model: PreTrainedModel, name: str) -> Path:
        """Write a plain model with its tokenizer, and return where it is."""
        with self.store.artifact(name) as folder:
            save_quantized(model, folder)
            if self.tokenizer is not None:
                for option in ("is_local", "local_files_only"):  # of the loading here; transformers would write it
                    self.tokenizer.init_kwargs.pop(option, None)
                self.tokenizer.save_pretrained(folder)
        return self.store.directory / name

    def write_cards(self) -> None:
        """Write the cards of all folders again, with everything that is known at the end."""
        for kind, details in self._cards.items():
            self._write_card(kind, self.store.directory / kind, **details)

    def _note(self, kind: str, **details: Any) -> None:
        self._cards[kind] = details
        self.result["artifacts"][kind] = kind

    def _write_card(self, kind: str, folder: Path, **details: Any) -> None:
        dtype = str(base_format(self.cfg)).removeprefix("torch.")
        base = base_of(self.cfg, self.result["provenance"])
        write_card(folder, kind, self.result, base, dtype=dtype, **details)
