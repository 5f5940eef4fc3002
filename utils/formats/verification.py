"""weights.py download --verify: is a published model whole, is it computed here as elsewhere, and does it write?"""

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
CONTEXT_TOKENS = 4096  # of a loaded model, unless more are asked for: its cache takes memory
TOLERANCE = 1e-4  # of logits in float32, or of the largest one, if that is above 1
TOKENS = 20


def verify(found: Found) -> dict[str, Any]:
    """Compare the files with the hub's hashes, load the model, compare its logits with transformers', and generate.

    Returns:
        hashed: the files whose hash is right; empty where nothing says which it should be.
        architecture, parameters; text: a line that it generates.
        unused: keys of config.json that have no counterpart.
        logit_difference: the largest between ours and transformers', None where transformers is not installed.

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
    except TokenizerError:  # a vocabulary without some of its characters
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
    """The logits (1, T, V) of transformers; None where it is not installed."""
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
