"""Files that are none, or become too large, are refused in one line, at once, in little memory."""

import ast
import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cosmos_cli
from cosmos_cli import archives, files, hashes, paths, pickles
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import requests
from cosmos_cli.model import mp4, text, weights
from cosmos_cli.paths import Run
from cosmos_cli.prep import embedding_files
from cosmos_cli.recipe import strict_yaml
from cosmos_cli.spec import TINY
from cosmos_cli.train import status
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import moving_square

PACKAGE = Path(cosmos_cli.__file__).parent
# What a hostile file may add to the memory of a process.
MOST_MB = 100


def make_pipe(path):
    os.mkfifo(path)


def make_endless(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as stream:
        here = Path.cwd()
        # The name of a socket has a hundred characters at most.
        os.chdir(path.parent)
        stream.bind(path.name)
        os.chdir(here)


def make_loop(path):
    path.symlink_to(path.name)


def make_sparse(path):
    with path.open("wb") as stream:
        stream.truncate(10**13)


KINDS = {
    "pipe": (make_pipe, "is a pipe, not a file"),
    "endless": (make_endless, "is a device, not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "folder": (Path.mkdir, "is a folder, not a file"),
    "loop": (make_loop, "cannot be read: Too many levels of symbolic links"),
    "sparse": (make_sparse, "is larger than"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "does not exist"),
}
READERS = {
    "recipe": (strict_yaml.read_entries, ExitCode.USAGE),
    "batch": (requests.read_batch, ExitCode.USAGE),
    "json": (files.read_json, ExitCode.ASSET),
    "hash": (hashes.sha256_file, ExitCode.ASSET),
    "embedding": (lambda path: embedding_files.read_embedding(path, TINY.text), ExitCode.ASSET),
    "weights": (weights.load_dit_state, ExitCode.ASSET),
    "manifest": (lambda path: paths.Dataset(path.parent, path.parent).read_manifest(), 5),
    "metrics": (lambda path: status.rows(Run(path.parent)), ExitCode.ASSET),
}
NAMES = {"manifest": "manifest.json", "metrics": "metrics.jsonl"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_not_regular_is_refused_by_name(tmp_path, kind, reader):
    make, found = KINDS[kind]
    read, code = READERS[reader]
    path = tmp_path / NAMES.get(reader, "file.pt")
    make(path)
    if reader in NAMES and not path.exists():
        pytest.skip("counts as missing")
    if (reader, kind) == ("weights", "folder"):
        pytest.skip("may be a model")
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        read(path)
    assert time.monotonic() - began < 5
    assert (refused.value.code, refused.value.what.startswith(found)) == (code, True), refused.value
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = tmp_path / "a.txt"
    path.touch(mode=0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(files.BadFile, match="cannot be read: Permission denied"):
        files.read_text(path, files.CAPTION)


def test_a_file_without_a_size_or_that_grows_is_read_up_to_its_limit(tmp_path):
    small = files.CAPTION._replace(limit=100)
    with pytest.raises(files.BadFile, match="is larger than 100 bytes"):
        files.read_text(Path("/proc/self/status"), small)
    path = tmp_path / "log"
    path.write_bytes(bytes(100))
    with files.open_regular(path, small) as stream:
        path.write_bytes(bytes(1000))
        assert len(stream.read(101)) == 101
    with pytest.raises(files.BadFile, match="is larger than 100 bytes"):
        files.read_bytes(path, small)


def test_a_link_is_read_like_its_target(tmp_path):
    (tmp_path / "a").write_text("\ufeffone\r\ntwo", encoding="utf-8")
    (tmp_path / "b").symlink_to("a")
    assert files.read_text(tmp_path / "b", files.CAPTION) == "one\ntwo"


def blocked(*_):
    pytest.fail("opening a pipe blocks")


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path):
    path = tmp_path / "changing"
    path.touch()
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for make in (os.mkfifo, Path.touch):
                other = tmp_path / "other"
                make(other)
                other.replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    before = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(30)
    began, opened = time.monotonic(), 0
    try:
        while time.monotonic() - began < 1:
            try:
                files.open_regular(path, files.CAPTION).close()
                opened += 1
            except files.BadFile as error:
                assert error.what == "is a pipe, not a file"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        stop.set()
        thread.join()
    assert opened


# --- what is small and becomes large --------------------------------------------------------------


def zip_of(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)


def inflating(path):
    """A text of 150 MB in a pickle, in 0.15 MB."""
    size = 150 * 10**6
    content = b"\x80\x02X" + size.to_bytes(4, "little") + b"a" * size + b"."
    zip_of(path, {"data.pkl": content, "version": "3\n"})


def inflating_numbers(path):
    """A whole file of torch's, but its numbers are compressed."""
    torch.save({"x": torch.zeros(4 * 10**7)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    zip_of(path, members)


def lying(path):
    """The list of members says that the pickle has 10 bytes."""
    inflating(path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
    path.write_bytes(content)


def pickled(code):
    return lambda path: zip_of(path, {"data.pkl": code, "version": "3\n"}, zipfile.ZIP_STORED)


def write(content):
    return lambda path: path.write_bytes(content)


def header_of_a_safetensors_file(path):
    with path.open("wb") as stream:
        stream.write((90 * 10**6).to_bytes(8, "little") + b'{"a":[' + b"[]," * (30 * 10**6 - 3))
        stream.truncate(91 * 10**6)


MANY = 300_000_000
ZEROS = b"c__builtin__\nbytearray\nJ" + MANY.to_bytes(4, "little") + b"\x85R."
# A text of a megabyte, encoded a thousand times.
REPEATED = (
    b"\x80\x02(X@B\x0f\x00" + b"a" * 10**6 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    + b"c_codecs\nencode\nq\x02" + b"h\x02h\x00h\x01\x86R" * 1000 + b"l."
)  # fmt: skip
HOSTILE = {
    "inflating.pt": inflating,
    "numbers.pt": inflating_numbers,
    "lying.pt": lying,
    "zeros.pt": pickled(b"\x80\x02" + ZEROS),
    "lists.pt": pickled(b"\x80\x02(" + b"]" * 3_900_000 + b"l."),
    "memo.pt": pickled(b"\x80\x02]r\x00\x00\x00\x7f."),
    "repeated.pt": pickled(REPEATED),
    "old.pt": write(b"\x80\x02" + ZEROS),
    "old text.pt": write(b"\x80\x02X\xff\xff\xff\x7f" + bytes(1000)),
    "inflating.jit": inflating,
    "memo.jit": pickled(b"\x80\x02]r\x00\x00\x00\x7f."),
    "header.safetensors": header_of_a_safetensors_file,
    "memo.pickle": write(b"\x80\x02]r\x00\x00\x00\x7f."),
    "frame.pickle": write(b"\x80\x04\x95" + (2**33).to_bytes(8, "little") + b"]."),
    "repeated.pickle": write(REPEATED),
    "long.pickle": write(b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b"abc."),
    "objects.pickle": write(
        b"cnumpy\nndarray\n(J" + MANY.to_bytes(4, "little") + b"\x85X\x01\x00\x00\x00OtR."
    ),
    "claim.pickle": write(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nJ" + MANY.to_bytes(4, "little")
        + b"\x85X\x01\x00\x00\x00OtR."
    ),
    "deep.json": write(b"[" * 200_000),
    "wide.json": write(b"[" + b"{}," * 5_000_000 + b"{}]"),
    "deep.jsonl": write(b'{"prompt":' + b"[" * 200_000 + b"\n"),
    "laughs.yaml": write(
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9))
                   for i in range(ord("b"), ord("k")))
    ),
    "deep.yaml": write(b"a: " + b"[" * 40_000),
}  # fmt: skip
READ = """
import resource, sys, time
from pathlib import Path
from cosmos_cli import files
from cosmos_cli.errors import UserError
from cosmos_cli.generate import requests
from cosmos_cli.model import weights
from cosmos_cli.prep import embedding_files
from cosmos_cli.recipe import loading
from cosmos_cli.spec import TINY
readers = {
    ".pt": weights.load_dit_state, ".jit": weights._read_torchscript,
    ".safetensors": weights.load_dit_state, ".json": files.read_json,
    ".pickle": lambda path: embedding_files.read_embedding(path, TINY.text),
    ".jsonl": lambda path: [request.read() for request in requests.read_batch(path)],
    ".yaml": loading.load,
}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for name in sys.argv[1:]:
    path, before, began = Path(name), peak(), time.monotonic()
    try:
        result = readers[path.suffix](path)
        said = f"read {str(result)[:80]}"
    except UserError as error:
        said = str(error).splitlines()[0][:300]
    print(f"{path.name}\\t{said}\\t{peak() - before}\\t{time.monotonic() - began:.1f}", flush=True)
"""


@pytest.mark.workflow
def test_small_files_that_expand_in_memory_are_refused(tmp_path):
    for name, make in HOSTILE.items():
        make(tmp_path / name)
    paths = [str(tmp_path / name) for name in HOSTILE]
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 3]
    assert [row[0] for row in rows] == list(HOSTILE), done.stderr[-2000:]
    wrong = [
        row for row in rows
        if row[1].startswith("read ") or int(row[2]) > MOST_MB or float(row[3]) > 10
    ]  # fmt: skip
    assert wrong == []


def test_a_scan_accepts_files_written_by_torch_and_numpy(tmp_path):
    state = {f"net.blocks.{i}.weight": torch.randn(3, 4) for i in range(300)}
    for new in (True, False):
        path = tmp_path / f"{new}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        assert archives.check_torch(path) is new
        archives.check_weights(path)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv3d(3, 4, 3))
    torch.jit.script(module).save(str(tmp_path / "a.jit"))
    assert archives.check_torch(tmp_path / "a.jit")
    save_file(state, tmp_path / "a.safetensors")
    archives.check_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
def test_an_embedding_of_every_protocol_is_read(tmp_path, protocol, dtype):
    array = np.random.default_rng(0).normal(size=(7, TINY.text.channels)).astype(dtype)
    for value in ([array], array):
        path = tmp_path / "a.pickle"
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        pickles.scan_pickle(io.BytesIO(path.read_bytes()), files.EMBEDDING.limit)
        read = embedding_files.read_embedding(path, TINY.text)
        assert np.array_equal(read.numpy(), array.astype(array.dtype.newbyteorder("=")))


def test_a_damaged_text_encoder_folder_is_an_error_of_one_line(tmp_path):
    source = paths.EMBEDDED_DIR / "t5"
    for name, make in (
        ("tokenizer.json", make_pipe),
        ("tokenizer_config.json", make_endless),
        ("config.json", lambda path: path.write_text("[" * 200_000)),
        ("model.safetensors", header_of_a_safetensors_file),
    ):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(UserError) as refused:
            text.TextEncoder(folder, TINY.text, "cpu", torch.float32).encode(["a"])
        assert refused.value.code == ExitCode.ASSET and "\n" not in str(refused.value)


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.workflow
@pytest.mark.parametrize("kind", ["pipe", "endless", "socket", "folder"])
def test_a_command_names_the_kind_of_thing_that_is_not_a_file(tmp_path, kind):
    make, found = KINDS[kind]
    make(tmp_path / "given")
    cosmos = Cosmos(tmp_path)
    for code, arguments in (
        (2, ("recipes", "check", "given")),
        (2, ("generate", "tiny", "--batch", "given")),
        (4, ("generate", "tiny", "--prompt", "a", "--model", "given")),
        (4, ("generate", "tiny", "--prompt", "a", "--set", "base=given")),
        (4, ("generate", "tiny", "--prompt", "a", "--lora", "given")),
    ):
        if kind == "folder" and "check" not in arguments and "--batch" not in arguments:
            continue
        refused = cosmos(*arguments, code=code, seconds=60).stderr
        assert found.removeprefix("is ").partition(",")[0] in refused, refused
        assert "Traceback" not in refused


@pytest.mark.workflow
def test_prep_rejects_videos_whose_caption_is_not_a_file(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    videos.mkdir(parents=True)
    for name in ("good", *KINDS):
        mp4.write_mp4(videos / f"{name}.mp4", moving_square(13, 64, 96), 12, 18)
        if name != "good":
            KINDS[name][0](videos / f"{name}.txt")
    (videos / "good.txt").write_text("A square.")
    (tmp_path / "datasets" / "tiny" / "t5_xxl").mkdir()
    os.mkfifo(tmp_path / "datasets" / "tiny" / "t5_xxl" / "other.pickle")
    result = Cosmos(tmp_path).json("prep", "tiny", *settings())
    reasons = {row["file"]: row["reason"] for row in result["videos"]}
    assert reasons.pop("good.mp4") == ""
    for name, reason in reasons.items():
        expected = "no caption" if name == "dangling.mp4" else f"the caption {name[:-4]}.txt"
        assert reason.startswith(expected), reason
    assert result["captions_unused"]["embeddings"] == ["t5_xxl/other.pickle"]


@pytest.mark.workflow
def test_a_batch_from_a_process_substitution_names_the_right_option(tmp_path):
    command = f'{sys.executable} -m cosmos_cli generate tiny --batch <(echo \'{{"prompt": "a"}}\')'
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=Cosmos(tmp_path).environment(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is a pipe, not a file" in done.stderr and "--prompts -" in done.stderr


# --- the rule itself ------------------------------------------------------------------------------

OPENERS = {
    "open", "read_text", "read_bytes", "ZipFile", "is_zipfile", "safe_open", "load_file",
    "from_pretrained", "file_digest",
}  # fmt: skip
# Of these modules `load` reads a file.
LOADERS = {"torch", "jit", "np", "numpy", "yaml", "Image", "tarfile"}
# Where a file may be opened another way, and why.
ALLOWED = {
    "files.py": "the place itself",
    "hashes.py": "a file that files.py has opened",
    "archives.py": "archives, through a stream that open_regular opened",
    "generate/answers.py": "an entry of our own, whose sha256 stands in front",
    "setup/checks.py": "the kernel's file on memory",
    "prep/work_sharing.py": "a lock that is made",
    "console.py": "a log that is written, and /dev/null",
    "download/fetch.py": "an MD5, of a file that open_regular opened",
    "locks.py": "a lock that is made",
    "setup/probes.py": "logs of its own processes",
    "setup/installs.py": "a log of its own process",
    "html.py": "pictures that were just written",
    "download/t5.py": "the encoder's file that is written",
    "train/trackers.py": "a log of its own process, pictures that were just written",
    "generate/guards/aegis.py": "a text of the package; peft, behind check_model_folder",
    "model/containers.py": "FFmpeg, behind the look of video.py at the kind of file",
    "prep/damage.py": "FFmpeg, behind the look of video.py at the kind of file",
    "generate/text_models.py": "a text of the package",
    "generate/inputs.py": "Pillow, behind a hash that reads files only",
    "generate/hash_cache.py": "a hash that an earlier command wrote",
    "model/lora_files.py": "safetensors, behind check_safetensors",
    "train/metrics.py": "a run's figures, written",
    "prep/latent_files.py": "safetensors, behind check_safetensors",
    "cpu_memory.py": "the kernel's own files",
    "model/shared_weights.py": "memory that the command made",
    "train/reshard.py": "a resume state, whose hashes were compared",
    "prep/embedding_files.py": "a pickle that is written",
    "model/pretrained.py": "transformers, behind check_model_folder",
    "model/mp4.py": "mp4 files that were just written",
    "model/video.py": "FFmpeg, behind a look of its own at the kind of file",
    "model/weights.py": "torch and safetensors, behind check_torch and check_safetensors",
}


def opens(tree):
    """The calls that open a file by its name, as their source."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            name, owner = node.func.id, ""
        elif isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, ast.unparse(node.func.value)
        else:
            continue
        if owner in ("files", "os") and name != "open":
            continue
        if name in OPENERS or (name == "load" and owner.rpartition(".")[2] in LOADERS):
            yield ast.unparse(node)


def test_files_are_opened_in_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix(): list(opens(ast.parse(path.read_text("utf-8"))))
        for path in PACKAGE.rglob("*.py")
    }
    elsewhere = {name: calls for name, calls in found.items() if calls and name not in ALLOWED}
    assert elsewhere == {}
    # One that opens nothing any more needs no leave.
    assert [name for name in ALLOWED if not found[name]] == []


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"files.py"}))
def test_a_library_that_opens_by_name_is_behind_a_check(name):
    source = (PACKAGE / name).read_text("utf-8")
    for library, check in (
        ("from_pretrained(", "check_model_folder("),
        ("safe_open(", "check_safetensors("),
        ("load_file(", "check_safetensors("),
    ):
        assert library not in source or check in source


# --- temporary files ------------------------------------------------------------------------------


def test_only_temporary_files_of_killed_processes_are_removed_from_a_users_folder(tmp_path):
    begin = "from pathlib import Path; from cosmos_cli import files; import os\n"
    kill = "with files.atomic_file(Path('killed.mp4')): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", begin + kill], cwd=tmp_path, check=False)
    (left,) = tmp_path.iterdir()
    theirs = {".mine.tmp", ".99999999.tmp", f".99999999.00000000.{left.name.split('.')[3]}.tmp.mp4"}
    for name in theirs:
        (tmp_path / name).touch()
    with files.atomic_file(tmp_path / "living.mp4"):
        files.remove_own_stale(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(theirs) + 1
    assert {path.name for path in tmp_path.iterdir()} == theirs | {"living.mp4"}
    assert not left.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_as_readable_as_the_umask_allows(tmp_path, umask):
    # torch and tempfile write private files.
    script = f"import os; os.umask({umask}); from pathlib import Path; from cosmos_cli import files"
    script += """
with files.atomic_file(Path('a')) as temporary:
    temporary.unlink()
    os.close(os.open(temporary, os.O_CREAT, 0o600))
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask
