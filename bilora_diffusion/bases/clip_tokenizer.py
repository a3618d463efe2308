"""CLIP's tokenizer: read from a base's folder, or made of merges, of which SDXL's are shipped."""

from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer

from bilora_diffusion.errors import UserError

__all__ = ["clip_tokenizer", "clip_vocabulary", "read_tokenizer", "sdxl_merges"]

END_OF_TEXT = "<|endoftext|>"
MERGES_FILE = Path(__file__).parent / "sdxl_config" / "merges.txt"


def clip_tokenizer(
    merges: Sequence[tuple[str, str]] = (), pad_token: str = END_OF_TEXT, model_max_length: int = 77
) -> CLIPTokenizer:
    """A CLIP tokenizer over bytes and `merges`.

    Arguments:
        merges: pairs of tokens that are joined, the most frequent first. Without any, each byte is a token.
        pad_token: SDXL's first tokenizer pads with the end token, its second with "!" (id 0).
    """
    # vocab_file= and merges_file= are accepted by transformers 5 and ignored: the result knows two tokens.
    return CLIPTokenizer(
        vocab=clip_vocabulary(merges),
        merges=list(merges),
        pad_token=pad_token,
        model_max_length=model_max_length,
    )


def clip_vocabulary(merges: Sequence[tuple[str, str]] = ()) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes inside a word, bytes that end one, merged tokens, begin, end.

    SDXL's 48,894 merges give its 49,408 tokens.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
    arXiv:2103.00020 (simple_tokenizer.py of the published code).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # GPT-2's byte alphabet: the 68 bytes without a printable character borrow one from beyond the first 256.
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merged = (first + second for first, second in merges)
    tokens = [*characters, *(c + "</w>" for c in characters), *merged, "<|startoftext|>", END_OF_TEXT]
    return {token: number for number, token in enumerate(tokens)}


def sdxl_merges() -> list[tuple[str, str]]:
    """The merges of both tokenizers of SDXL, from the shipped file (see NOTICE for where it comes from)."""
    lines = MERGES_FILE.read_text(encoding="utf-8").splitlines()
    return [(first, second) for first, second in (line.split() for line in lines)]


def read_tokenizer(folder: Path, name: str, where: str) -> CLIPTokenizer:
    """The tokenizer in `folder`/`name`, stored by any version of transformers.

    Raises:
        UserError: it is missing or damaged; `where` (the flag and the model) begins the message.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=name, local_files_only=True)
    except Exception as error:  # a damaged file surfaces as whatever the Rust library under it raises
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: its {name} could not be loaded: {reason}") from error
    # Without its vocabulary file transformers 5 builds, silently, a tokenizer of the special tokens alone.
    if len(tokenizer) <= 3:
        raise UserError(f"{where}: its {name} has no vocabulary; the copy is incomplete.")
    return tokenizer
