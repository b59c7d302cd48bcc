"""Fine-tune a pruned model in a loop of one's own with accelerate, on one process or several.

    python examples/accelerate_loop.py [MODEL [OUT]]
    accelerate launch --num_processes 2 examples/accelerate_loop.py [MODEL [OUT]]     # --cpu without GPUs

MODEL is a pruned folder, or a name on the Hub; without one the embedded model of this checkout is pruned by magnitude.
OUT is a folder.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import lors

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "harness" / "microworld" / "checkpoint"
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else "out")
texts = [json.loads(line)["text"] for line in (HERE / "texts.jsonl").open()]

accelerator = Accelerator()
set_seed(0)  # the adapter starts alike in all processes
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
if lors.check(model)["sparsity"] < 0.1:
    lors.prune(model, "magnitude", sparsity=0.5)
before = lors.check(model)
model = get_peft_model(model, lors.LorsConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM"))
rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=256)["input_ids"]]
loader = DataLoader(rows, 8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = accelerator.prepare(loader)
lors.initialize(model.to(accelerator.device), islice(loader, 4))  # each process hands over its own batches
model, optimizer = accelerator.prepare(model, optimizer)

for step, batch in enumerate(islice(loader, 20)):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(f"step {step}, loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")

trained = accelerator.unwrap_model(model)
if accelerator.is_main_process:
    trained.save_pretrained(OUT / "adapter")
    after = lors.check(trained.merge_and_unload())
    print(f"sparsity before {before['sparsity']:.4f}, after {after['sparsity']:.4f}")
accelerator.end_training()
