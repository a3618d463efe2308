"""Upload to the model hub: the LoRA files, the card and its pictures. Nothing else of the output folder leaves."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

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
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--push_to_hub: the upload failed ({str(error).splitlines()[0]}); everything is saved in {folder}"
        ) from None
    return repository
