"""Published weights: from the local cache, the configured hub, or its mirror; and weights from a file or
folder.

Never random weights in place of the ones asked for, and nothing is unpickled.
"""

import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.checksum import checksum
from common.errors import UserError, first_line, why_not_loaded
from common.run_files import frozen_beside

MIRROR = "https://hf-mirror.com"
CONNECT_SECONDS = 3  # per endpoint, so that without a network the run stops well within 10 seconds
_TOWER_OF = {"--image-weights": "image_tower", "--text-weights": "text_tower"}


def _ways_out(what: str, folder_option: str) -> str:
    # a text encoder without weights would still need its vocabulary from the hub
    without = (
        "--text-encoder bert-tiny-bytes" if folder_option == "--text-encoder" else "--image-weights none"
    )
    return (
        f"Ways out: (1) set HTTPS_PROXY, or HF_ENDPOINT to a hub this machine reaches; (2) download {what} "
        f"elsewhere and give its local folder: {folder_option} FOLDER; (3) do without the download: {without}"
    )


def _check_answers(url: str) -> None:
    """Raise OSError unless there is an answer at once; the hub library would wait and retry for minutes."""
    errors: list[OSError] = [TimeoutError(f"no answer within {CONNECT_SECONDS} s")]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            errors.clear()  # any answer is an answer
        except OSError as error:
            errors[:] = [error]
        else:
            errors.clear()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name heeds no timeout
    asking.start()
    asking.join(CONNECT_SECONDS + 1)
    if errors:
        raise errors[0]


def _snapshot(repo_id: str, patterns: Sequence[str], needed: Sequence[str], **how: Any) -> Path | None:
    """The folder of what matches `patterns` and the first of `needed` that the repository holds. None: it
    holds none of these.
    """
    from huggingface_hub import snapshot_download

    for name in needed:  # one after the other: they may be the same weights in two formats
        folder = Path(snapshot_download(repo_id, allow_patterns=[*patterns, name], **how))
        if any(any(folder.glob(name)) for name in needed):
            return folder
    return None


def fetch_from_hub(
    repo_ids: Sequence[str], patterns: Sequence[str], needed: Sequence[str], folder_option: str
) -> Path:
    """Local folder with the files of the first of `repo_ids` that can be had: those that match `patterns`,
    and the first of the globs `needed` that matches one.

    Looks in the cache, then at the configured endpoint, then at the mirror.
    Raises UserError within seconds when there is no network, naming the ways out.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    for repo_id in repo_ids:
        try:
            folder = _snapshot(repo_id, patterns, needed, local_files_only=True)
        except Exception:  # not in the cache; each hub version has its own error for it
            continue
        if folder:
            return folder
    repo_id = repo_ids[-1]
    endpoints = list(dict.fromkeys([constants.ENDPOINT, MIRROR]))
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{repo_id} is not in the local cache, and HF_HUB_OFFLINE forbids downloading. "
            + _ways_out(repo_id, folder_option)
        )
    if not endpoints[0].startswith(("https://", "http://")):
        raise UserError(
            f"HF_ENDPOINT {endpoints[0]!r} is no address; begin it with https://, such as https://hf-mirror.com"
        )
    failures = []
    for endpoint in endpoints:
        print(f"fetching {repo_id} from {endpoint}", flush=True)
        try:
            _check_answers(f"{endpoint}/api/models/{repo_id}")  # a proxy may answer for the first page alone
            folder = _snapshot(repo_id, patterns, needed, endpoint=endpoint, etag_timeout=CONNECT_SECONDS)
        except RepositoryNotFoundError:
            failures.append(f"{endpoint}: has no repository {repo_id}")
        except Exception as error:  # whatever its wording, this endpoint did not deliver; try the next
            failures.append(f"{endpoint}: {first_line(error, 120)}")
        else:
            if folder:
                return folder
            failures.append(f"{endpoint}: {repo_id} holds no {' or '.join(needed)}")
    raise UserError(
        f"the weights of {repo_id} could not be had ({'; '.join(failures)}). "
        + _ways_out(repo_id, folder_option)
    )


def read_state_dict(path: Path, option: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pth file, or of the folder that holds model.safetensors or
    pytorch_model.bin.

    A checkpoint of this program gives its whole model, with names such as `image_tower.…`; one with the tower
    of `option` frozen gives that tower, from its file beside the checkpoint or one folder above.
    Raises UserError when a file is missing, damaged, or holds anything but tensors.
    """
    if path.is_dir():
        older = path / "pytorch_model.bin"
        newer = path / "model.safetensors"
        path = older if older.is_file() and not newer.is_file() else newer
    content = _content_of(path, option)
    tower, frozen = _TOWER_OF.get(option), content.get("frozen") if isinstance(content, dict) else None
    if isinstance(frozen, dict) and tower in frozen:
        file = frozen_beside(path.absolute(), tower)
        if not file.is_file():
            raise UserError(
                f"{option} {path} was trained with a frozen {tower.replace('_', ' ')}, which is kept once in "
                f"{file.name}; put that file of the run beside it, or give its own path"
            )
        content = _content_of(file, option)
        tensors = _tensors_in(content, f"{option} {file}")
        try:
            own = checksum({"format": content.get("format"), "tower": tensors})
        except (ValueError, TypeError, RuntimeError) as error:  # it holds what no file of this program does
            raise UserError(f"{option} {file} cannot be read as weights: {error}") from None
        if own != frozen[tower]:
            raise UserError(f"{file} is of another run than {path}; put the file of that run beside it")
        return tensors
    return _tensors_in(content, f"{option} {path}")


def _tensors_in(content: Any, named: str) -> dict[str, torch.Tensor]:
    for wrapper in ("model", "state_dict", "tower"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{named} holds no table of tensors")
    return content


def _content_of(path: Path, option: str) -> Any:
    """What a file of weights holds, on the CPU. Raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{option} {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with open(path, "rb") as file:
            if file.read(2) == b"PK":  # torch.load has many words for a zip without its end
                zipfile.ZipFile(file).close()
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(
            f"{option} {path} cannot be read as weights: {why_not_loaded(error)}; "
            "give a .safetensors file, or a .pth file that holds tensors only"
        ) from None


def part_of(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def load_into(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load every tensor of `module` from `state`; extra tensors (a classifier head) are left out.

    Raises UserError when one is missing or has another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or wrong:
        example = (missing or wrong)[0]
        raise UserError(
            f"{source} does not fit the encoder: {len(missing)} tensors are missing and {len(wrong)} "
            "have another "
            f"shape (first: {example}); is it for another architecture?"
        )
    module.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
