"""What of a model is on this disk and what the hub has to be asked for, failures told in one line."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bilora_diffusion.errors import UserError

__all__ = ["fetch"]


def fetch(
    name: str,
    patterns: list[str],
    flag: str,
    revision: str | None,
    cache_dir: str | None,
    revision_flag: str = "--revision",
) -> Path:
    """Downloads what of a hub model is not in the cache yet; returns its folder there.

    Arguments:
        patterns: the files wanted, such as "unet/*.json"; a pattern without a file is no error.
        flag: the flag that named the model, for the messages.
        revision_flag: the flag that named its revision, likewise.

    Raises:
        UserError: no such model or revision, no permission, or no connection and not cached.
    """
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{flag}: {name} is gated: accept its licence on its page on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{revision_flag}: {name} has no revision {revision}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{flag}: {name} is no file or folder here, and no model on the hub that you may read."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no connection"
        raise UserError(
            f"{flag}: {name} is no file or folder here, and the hub cannot be asked for it ({reason}); "
            "correct the path, or connect once to fetch it."
        ) from error
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: {name} could not be fetched from the hub: {reason}") from error
