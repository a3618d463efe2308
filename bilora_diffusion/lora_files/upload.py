"""Upload to the model hub: the LoRA files, the card and its pictures. Nothing else of the output folder leaves."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError

__all__ = ["push"]


def push(config: TrainingConfig, folder: Path, files: Sequence[str]) -> str:
    """Uploads to `--hub_model_id`, by default the output folder's name, making the repository if needed.

    Returns:
        the repository's id.

    Raises:
        UserError: the hub refused or cannot be reached; everything is saved locally by then.
    """
    api = HfApi(token=config.hub_token)
    try:
        repository = api.create_repo(config.hub_model_id or folder.resolve().name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*files, "README.md"],
            commit_message="End of training",
        )
    except Exception as error:  # no network, no right, no such name: of the hub's, the transport's and Python's kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--push_to_hub: the upload failed ({reason}); everything is saved in {folder}: upload it by hand"
        ) from None
    return repository
