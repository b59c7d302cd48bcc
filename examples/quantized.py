"""Prune a model, quantise it to 4 bits on its zeros, fine-tune it with LoRS on the grid, merge it onto the same grid.

    python examples/quantized.py [MODEL [OUT]]

MODEL is a folder or a name on the Hub; without one it is the embedded model of this checkout. OUT is a folder.
"""

import json
import sys
from pathlib import Path

from peft import PeftModel, get_peft_model
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


def base():
    """The quantised model: its codes take the place of the dense weights that lie beside them."""
    return lors.load_quantized(AutoModelForCausalLM.from_pretrained(OUT / "quantized"), OUT / "quantized")


# Prune and quantise; a zero is a point of every grid.
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
lors.prune(model, "wanda", sparsity=0.5, calibration=texts, tokenizer=tokenizer)
lors.quantize(model, "gptq", bits=4, group=32, calibration=texts, tokenizer=tokenizer)
lors.save_quantized(model, OUT / "quantized")
tokenizer.save_pretrained(OUT / "quantized")

# Fine-tune. With bits and group of the base the merged weight is on its grid in every step.
config = lors.LorsConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", init="kaiming", bits=4, group=32)
model = get_peft_model(base(), config)
trainer = Trainer(
    model,
    TrainingArguments(
        OUT / "trainer",
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=[{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=256)["input_ids"]],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(OUT / "adapter")

# Merge: still codes of 4 bits, still zero where the pruned model is.
merged = PeftModel.from_pretrained(base(), OUT / "adapter").merge_and_unload()
lors.save_quantized(merged, OUT / "merged")
tokenizer.save_pretrained(OUT / "merged")
weight = merged.get_submodule(next(iter(lors.check(merged)["layers"])))
print(f"sparsity {lors.check(merged)['sparsity']:.4f}, layout {weight.layout}, in {OUT / 'merged'}")
