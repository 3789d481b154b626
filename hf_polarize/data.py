"""Text, images or tokens in, batches of model inputs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

SELF = "self"
"""Name of the calibration data that the original model writes itself."""

Batch = dict[str, torch.Tensor]


def is_text_model(model: PreTrainedModel) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Tell whether a model predicts the next token of its input: it has an output embedding and looks only back."""
    return (
        is_text_model(model)
        and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        and model.get_output_embeddings() is not None
    )


def read_texts(data: Any, text_column: str | None = None) -> list[str]:
    """
    Return the documents of a text source.

    Args:
        data: the path of a text file (one document), a list of strings, or a `datasets.Dataset` (or any iterable of
            dicts) with a column of strings.
        text_column (`str`, *optional*): of a dataset; the first column of strings if left out.

    Raises:
        FileNotFoundError: If `data` is a path and there is no such file.
        ValueError: If there is no text in it.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(
                f'no text file "{data}". Data is the path of a text file, "{SELF}" (text that the original model '
                "writes itself), a list of strings, or a datasets.Dataset."
            )
        texts = [path.read_text(encoding="utf-8")]
    elif isinstance(data, Sequence) and all(isinstance(item, str) for item in data):
        texts = list(data)
    elif hasattr(data, "keys") and not hasattr(data, "column_names"):
        raise ValueError(f"data is a dict of {sorted(data)}; choose one of them")
    elif isinstance(getattr(data, "column_names", None), dict):
        raise ValueError(f"data is a DatasetDict; choose one split: data[{sorted(data)[0]!r}], of {sorted(data)}")
    elif isinstance(data, Iterable):
        rows = list(data)
        column = text_column or next(
            (key for key, value in (rows[0] if rows else {}).items() if isinstance(value, str)), None
        )
        if rows and (column is None or column not in rows[0]):
            raise ValueError(f"no text column {text_column or ''} in the data set; it has {sorted(rows[0])}")
        texts = [row[column] for row in rows]
    else:
        raise ValueError(f"can't read calibration data from {type(data).__name__}")
    if not any(text.strip() for text in texts):
        raise ValueError("the data holds no text")
    return texts


def token_windows(
    texts: Sequence[str],
    tokenizer: Any,
    window: int,
    count: int | None = None,
    special_tokens: bool = False,
) -> torch.Tensor:
    """
    Tokenize the whole text once and cut it into windows of equal length that don't overlap.

    Args:
        texts (`Sequence[str]`): documents, joined by a blank line.
        tokenizer: of the model.
        window (`int`): tokens per window.
        count (`int`, *optional*): take that many windows, spread evenly over the text; all of them if left out or if
            there are fewer.
        special_tokens (`bool`, defaults to `False`): put the tokens that the tokenizer adds to every input (an
            encoder's `[CLS]` and `[SEP]`, say) around each window, inside its length.

    Returns:
        `torch.Tensor` of shape `(count, window)`, int64.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _special_tokens(tokenizer) if special_tokens else ([], [])
    body = window - len(before) - len(after)
    total = len(ids) // body if body > 0 else 0
    if total < 1:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}: give more text")
    chosen = range(total) if count is None or count >= total else [i * total // count for i in range(count)]
    return torch.tensor([before + ids[i * body : (i + 1) * body] + after for i in chosen])


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after every input."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


@torch.no_grad()
def self_windows(
    model: PreTrainedModel, window: int, count: int, seed: int, batch_size: int = 16, start_token: int | None = None
) -> torch.Tensor:
    """
    Let a causal language model write its own calibration text: sample at temperature 1 from its first token.

    What follows the end of a text is the next one, as in pretraining.

    Args:
        model (`PreTrainedModel`): the original model.
        window (`int`): tokens per window, the first token included.
        count (`int`): number of windows.
        seed (`int`): of the sampling; torch's own random state is left as it was.
        batch_size (`int`, defaults to 16): windows written side by side.
        start_token (`int`, *optional*): the model's beginning-of-text token if left out, or its end-of-text token.

    Returns:
        `torch.Tensor` of shape `(count, window)`, int64.
    """
    first = start_token
    if model.can_generate():
        for settings in (model.generation_config, model.config):
            for key in ("bos_token_id", "eos_token_id"):
                token = getattr(settings, key, None)
                first = first if first is not None else token[0] if isinstance(token, list) else token
    if first is None or not model.can_generate():
        raise ValueError(
            f'{type(model).__name__} can\'t write its own calibration text (data="{SELF}"): it '
            + ("has no beginning-of-text token" if model.can_generate() else "does not generate")
            + "; give a text file, a list of strings or a data set"
        )
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=window - 1, min_new_tokens=window - 1,
        pad_token_id=first, eos_token_id=None, bos_token_id=first, use_cache=True,
    )  # fmt: skip
    parts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with logging.tqdm(total=count, desc="writing calibration text", unit="window") as bar:
            for start in range(0, count, batch_size):
                n = min(batch_size, count - start)
                prompt = torch.full((n, 1), first, device=model.device)
                parts.append(
                    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config).cpu()
                )
                bar.update(n)
    return torch.cat(parts)


def calibration_batches(
    model: PreTrainedModel,
    data: Any,
    processor: Any,
    window: int,
    max_tokens: int,
    batch_size: int,
    seed: int,
    text_column: str | None = None,
) -> list[Batch]:
    """
    Turn calibration data into batches of model inputs, without padding.

    Args:
        model (`PreTrainedModel`): the original model; it says which kind of input it takes, and writes `"self"`.
        data: what [`read_texts`] reads, `"self"`, a data set of tokens (column `input_ids`), of `pixel_values`, or of
            images, or a list of batches (dicts of tensors).
        processor: the tokenizer, or the image processor.
        window (`int`): tokens per window.
        max_tokens (`int`): at most that many tokens, in whole windows spread evenly over the text; at least one.
        batch_size (`int`): windows per batch.
        seed (`int`): for `"self"`.
        text_column (`str`, *optional*): of a data set.

    Returns:
        `list[dict[str, torch.Tensor]]` on the CPU.
    """
    if (
        isinstance(data, list)
        and data
        and isinstance(data[0], dict)
        and isinstance(next(iter(data[0].values())), torch.Tensor)
    ):
        return data
    if not is_text_model(model):
        return _image_batches(data, processor, batch_size)
    count = max(1, max_tokens // window)
    if isinstance(data, str) and data == SELF:
        return split(self_windows(model, window, count, seed), batch_size, model)
    if "input_ids" in (getattr(data, "column_names", None) or []):
        ids = torch.tensor([token for row in data["input_ids"] for token in row])
        total = len(ids) // window
        if total < 1:
            raise ValueError(f"the data set has {len(ids)} tokens, fewer than one window of {window}")
        chosen = [i * total // count for i in range(count)] if count < total else list(range(total))
        return split(ids[: total * window].view(total, window)[chosen], batch_size, model)
    if processor is None:
        raise ValueError("text data needs a tokenizer: polarize(model, data, processor=tokenizer)")
    texts = read_texts(data, text_column)
    return split(
        token_windows(texts, processor, window, count, special_tokens=not is_causal_lm(model)), batch_size, model
    )


def split(windows: torch.Tensor, batch_size: int, model: PreTrainedModel) -> list[Batch]:
    """Cut windows `(n, window)` into batches; an encoder-decoder reads and writes the same text."""
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    return [{"input_ids": part, **({"decoder_input_ids": part} if both else {})} for part in windows.split(batch_size)]


def _image_batches(data: Any, processor: Any, batch_size: int) -> list[Batch]:
    columns = getattr(data, "column_names", None) or []
    if "pixel_values" in columns:
        pixels = torch.as_tensor(data.with_format("numpy")["pixel_values"][:]).float()
    else:
        column = next((name for name in ("image", "img") if name in columns), None)
        if column is None or processor is None:
            raise ValueError(
                "a vision model is calibrated on a data set with a column pixel_values, or image with an image "
                f"processor; got {type(data).__name__} with columns {list(columns) or 'none'}"
            )
        pixels = processor(images=[image.convert("RGB") for image in data[column]], return_tensors="pt")[
            "pixel_values"
        ]
    if len(pixels) == 0:
        raise ValueError("the data set holds no images")
    return [{"pixel_values": part} for part in pixels.split(batch_size)]
