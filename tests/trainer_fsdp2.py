"""A LoRS training by the Trainer's own FSDP2, started by torchrun in `test_sharding`, and the same one unsharded.

Writes what it found as JSON into the file that is named.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from contract import pruned
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import lors

STEPS, ROWS, LENGTH = 4, 4, 16


def train(folder: str, processes: int, **options) -> tuple[nn.Module, list[float]]:
    """The trained model as the Trainer has it, and the loss of every step."""
    torch.manual_seed(0)
    model = get_peft_model(pruned(), lors.LorsConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", init="kaiming"))
    tokens = torch.randint(model.config.vocab_size, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model_wrapped, losses


def main(output: Path, processes: int) -> None:
    """Shared out among the processes of torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        model, losses = train(folder, processes, fsdp=True, fsdp_config={"version": 2})
        parameters = list(model.parameters())
        own = [part.to_local() if isinstance(part, DTensor) else part for part in parameters]
        found = {
            "sharded": sum(isinstance(part, DTensor) for part in parameters),
            "of": len(parameters),
            "share": sum(part.nbytes for part in own) / sum(part.nbytes for part in parameters),
            "losses": losses,
        }
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(found))


def alone(output: Path) -> None:
    """One process, no shards."""
    with tempfile.TemporaryDirectory() as folder:
        output.write_text(json.dumps({"losses": train(folder, 1)[1]}))


if __name__ == "__main__":
    file, processes = Path(sys.argv[1]), int(sys.argv[2])
    main(file, processes) if processes else alone(file)
