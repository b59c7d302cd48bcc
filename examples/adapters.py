"""Several LoRS adapters on one pruned base: text from each, from both in one batch, from their sum; compiled.

    python examples/adapters.py [MODEL [OUT]]

MODEL is a pruned folder, or a name on the Hub; without one the embedded model of this checkout is pruned by magnitude.
OUT is a folder.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lors

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "harness" / "microworld" / "checkpoint"
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else "out")
texts = [json.loads(line)["text"] for line in (HERE / "texts.jsonl").open()]

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
base = AutoModelForCausalLM.from_pretrained(MODEL)
if lors.check(base)["sparsity"] < 0.1:
    lors.prune(base, "magnitude", sparsity=0.5)
base.save_pretrained(OUT / "pruned")

# Two adapters, each trained on texts of its own.
for name, part in (("one", texts[:8]), ("other", texts[8:16])):
    model = AutoModelForCausalLM.from_pretrained(OUT / "pruned")
    model = get_peft_model(model, lors.LorsConfig(r=8, lora_alpha=8, task_type="CAUSAL_LM"))
    batch = tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=128)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    lors.initialize(model, [batch])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(10):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(OUT / name)

# Both on one base.
base = AutoModelForCausalLM.from_pretrained(OUT / "pruned")
model = PeftModel.from_pretrained(base, OUT / "one", adapter_name="one").eval()
model.load_adapter(OUT / "other", adapter_name="other")
model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "both", combination_type="cat")

prompts = tokenizer([" ".join(text.split()[:4]) for text in texts[:2]], return_tensors="pt", padding=True)
length = {"max_new_tokens": 8, "do_sample": False}
answers = {}
for name in ("one", "other", "both"):
    model.set_adapter(name)
    answers[name] = model.generate(**prompts, **length)
with model.disable_adapter():
    answers["none"] = model.generate(**prompts, **length)
# One batch, an adapter for each row; __base__ is none.
answers["one and none"] = model.generate(**prompts, **length, adapter_names=["one", "__base__"])
for name, tokens in answers.items():
    print(f"{name}: {tokenizer.batch_decode(tokens, skip_special_tokens=True)}")

# Compiled, each adapted layer is one operator of the graph.
model.set_adapter("one")
with torch.no_grad():
    difference = torch.compile(model)(**prompts).logits - model(**prompts).logits
print(f"compiled and not: {difference.abs().max():.1e} apart")
