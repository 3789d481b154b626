"""Share a polarized model on the Hub."""

from __future__ import annotations

import fnmatch
import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn

from .card import model_card
from .checkpoint import ADAPTER_CONFIG, OWN_FILES, SIDECAR, save_polarized
from .inspection import inspect_checkpoint

# what belongs to a checkpoint; a run's own files (metrics, report, plot) in the same folder stay at home
CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*",
    SIDECAR, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm",
    "normalizer.json", "chat_template.jinja", "additional_chat_templates/*", "*processor_config.json",
)  # fmt: skip


def push_folder(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload polarized model",
) -> CommitInfo:
    """
    Upload a checkpoint to the Hub in one commit, with a model card.

    The adapter's configuration names the repository as its base model, which is how transformers finds the backbone
    of a repository that has an adapter at its root.

    Args:
        directory (`str` or `Path`): written by [`save_polarized`].
        repo_id (`str`): `user/name`; the repository is made if it does not exist.
        private (`bool`, *optional*): for a new repository.
        token (`str`, *optional*): the stored one if left out.
        commit_message (`str`): of the one commit.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        FileNotFoundError, ValueError: If the checkpoint is not whole (see [`inspect_checkpoint`]). Nothing is sent.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f'repo_id must be "user/name"; got "{repo_id}"')
    folder = Path(directory)
    info = inspect_checkpoint(folder)
    files = sorted({path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)})
    adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = repo_id
    contents: dict[str, Any] = {
        **{path.relative_to(folder).as_posix(): path for path in files},
        ADAPTER_CONFIG: (json.dumps(adapter, indent=2, sort_keys=True) + "\n").encode(),
        "README.md": str(model_card(info, repo_id)).encode(),
    }
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    # weights of an earlier push that this one doesn't replace would be read in the place of ours
    stale = {
        name
        for name in api.list_repo_files(repo_id)
        if name not in contents and any(fnmatch.fnmatch(name, pattern) for pattern in OWN_FILES)
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in sorted(stale)),
        *(CommitOperationAdd(name, content) for name, content in contents.items()),
    ]
    return api.create_commit(repo_id, operations, commit_message=commit_message)


def push_polarized(
    model: nn.Module, repo_id: str, processor: Any = None, max_shard_size: int | str = "5GB", **kwargs: Any
) -> CommitInfo:
    """
    Upload a polarized model to the Hub in one commit, with a model card.

    Args:
        model (`PreTrainedModel` or `PeftModel`): polarized.
        repo_id (`str`): `user/name`; the repository is made if it does not exist.
        processor (*optional*): a tokenizer or image processor to upload with it.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): of each file of weights.
        kwargs: `private`, `token` and `commit_message` of [`push_folder`].

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    with tempfile.TemporaryDirectory() as directory:
        save_polarized(model, directory, processor, max_shard_size)
        return push_folder(directory, repo_id, **kwargs)
