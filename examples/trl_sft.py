"""Fine-tune a pruned model with TRL's SFTTrainer: it takes the config of LoRS, or a model that has the adapter.

    python examples/trl_sft.py [MODEL [OUT]]

MODEL is a folder or a name on the Hub; without one it is the embedded model of this checkout. OUT is a folder.
"""

import json
import sys
from itertools import islice
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lors

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "harness" / "microworld" / "checkpoint"
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else "out")
texts = [json.loads(line)["text"] for line in (HERE / "texts.jsonl").open()]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
lors.prune(model, "wanda", pattern="2:4", calibration=texts, tokenizer=tokenizer)
model.save_pretrained(OUT / "pruned")
tokenizer.save_pretrained(OUT / "pruned")

config = lors.LorsConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM")
arguments = {
    "args": SFTConfig(
        OUT / "trainer",
        max_steps=10,
        per_device_train_batch_size=8,
        max_length=256,
        learning_rate=1e-3,
        bf16=False,  # of TRL the default is True; on a GPU leave it out
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    "train_dataset": Dataset.from_list([{"text": text} for text in texts]),
    "processing_class": tokenizer,
}

# The config: A is random, as in LoRA.
base = AutoModelForCausalLM.from_pretrained(OUT / "pruned")
trainer = SFTTrainer(base, peft_config=config, **arguments)
trainer.train()
trainer.save_model(OUT / "random_start")

# A model that has the adapter: A from the gradient of the loss, as in the paper.
base = AutoModelForCausalLM.from_pretrained(OUT / "pruned")
trainer = SFTTrainer(get_peft_model(base, config), **arguments)
lors.initialize(trainer.model, islice(trainer.get_train_dataloader(), 4))
trainer.train()
trainer.save_model(OUT / "gradient_start")
merged = trainer.model.merge_and_unload()
print(f"pattern {lors.check(merged)['pattern']}")
