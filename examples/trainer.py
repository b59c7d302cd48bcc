"""Prune a model, fine-tune it with LoRS and the Trainer of transformers, merge it, look at its zeros.

    python examples/trainer.py [MODEL [OUT]]

MODEL is a folder or a name on the Hub; without one it is the embedded model of this checkout. OUT is a folder.
"""

import json
import sys
from itertools import islice
from pathlib import Path

from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import lors

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "harness" / "microworld" / "checkpoint"
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else "out")
texts = [json.loads(line)["text"] for line in (HERE / "texts.jsonl").open()]

# Prune. What the adapter is trained on is saved first, for the adapter notes where its base is.
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
lors.prune(model, "wanda", sparsity=0.5, calibration=texts, tokenizer=tokenizer)
model.save_pretrained(OUT / "pruned")
tokenizer.save_pretrained(OUT / "pruned")

# Fine-tune.
model = AutoModelForCausalLM.from_pretrained(OUT / "pruned")
model = get_peft_model(model, lors.LorsConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM"))
trainer = Trainer(
    model,
    TrainingArguments(
        OUT / "trainer",
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        gradient_checkpointing=True,  # with it a step keeps hardly more than the weights
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=[{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=256)["input_ids"]],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
lors.initialize(model, islice(trainer.get_train_dataloader(), 4))  # the gradient start of the paper
trainer.train()
model.save_pretrained(OUT / "adapter")

# Merge: a plain model, in which every zero is still zero.
merged = AutoPeftModelForCausalLM.from_pretrained(OUT / "adapter").merge_and_unload(safe_merge=True)
merged.save_pretrained(OUT / "merged")
tokenizer.save_pretrained(OUT / "merged")
print(f"sparsity {lors.check(merged)['sparsity']:.4f}, in {OUT / 'merged'}")
