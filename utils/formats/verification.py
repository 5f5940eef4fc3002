"""weights.py download --verify: check that a published model is complete, gives the right logits and generates text."""

from __future__ import annotations

from typing import Any

import torch

from tokenizer import TokenizerError
from utils.formats.engines import quiet
from utils.formats.hub import Found, check_hashes
from utils.formats.pretrained import open_pretrained
from utils.formats.table import FormatError
from utils.inference.decode import start_tokens
from utils.inference.generator import Generator, Request
from utils.inference.sampling import SamplingOptions

PROMPT = "The "
CONTEXT_TOKENS = 4096  # largest context that is loaded, because the cache takes memory
TOLERANCE = 1e-4  # of logits in float32, relative to the largest one (at least 1)
TOKENS = 20


def verify(found: Found) -> dict[str, Any]:
    """Compare the files with the hub's hashes, load the model, compare its logits with transformers', and generate.

    Returns:
        hashed: the files whose hash was compared; empty if the hashes are not recorded.
        architecture; parameters: their number.
        text: a line that the model generates.
        unused: keys of config.json that have no counterpart.
        logit_difference: the largest absolute difference from transformers; None if it is not installed.

    Raises:
        UserError: a file is damaged, the model cannot be represented, or its logits differ.
    """
    hashed = check_hashes(found.folder)
    opened = open_pretrained(found.folder)
    tokenizer = opened.tokenizer()
    model = opened.load(torch.device("cpu"), torch.float32, CONTEXT_TOKENS)
    prompt = PROMPT
    try:
        tokenizer.encode(prompt)
    except TokenizerError:  # a character is not in the vocabulary
        prompt = ""
    idx = torch.tensor([start_tokens(tokenizer, prompt)])
    with torch.no_grad():
        ours = model(idx)[0]
    theirs = _their_logits(found, idx)
    difference = None if theirs is None else float((ours - theirs).abs().max())
    if not ours.isfinite().all():
        raise FormatError(f"{found.folder}: its logits are not finite; weights.py inspect --stats shows where")
    if difference is not None and not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise FormatError(f"{found.folder}: its logits differ from those of transformers by {difference:.2g}")
    request = Request(TOKENS, SamplingOptions(temperature=0))
    text = prompt + Generator(model, tokenizer).generate(prompt, request).text
    return {
        "hashed": hashed,
        "architecture": opened.family.architecture,
        "unused": opened.unknown,
        "parameters": model.num_parameters(),
        "logit_difference": difference,
        "text": text,
    }


def _their_logits(found: Found, idx: torch.Tensor) -> torch.Tensor | None:
    """The logits (1, T, V) of transformers; None if it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    with quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            found.folder, dtype=torch.float32, local_files_only=True
        )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(idx).logits
    return logits
