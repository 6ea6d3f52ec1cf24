"""CUDA_VISIBLE_DEVICES selects GPUs here as it does in CUDA."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from cosmos_cli import files, gpus, paths
from cosmos_cli.gpus import Gpu, select
from cosmos_cli.recipe import gpu_models, loading
from cosmos_cli.train import launch
from tests.helpers.command import Cosmos

A, B, C = "GPU-aa11-0001", "GPU-aa22-0002", "GPU-bb33-0003"
H100 = "NVIDIA H100 80GB HBM3"
MACHINE = [Gpu(index, H100, (9, 0), (uuid,)) for index, uuid in enumerate((A, B, C))]


def slice_of(index, profile, number, uuid="aa11"):
    ids = (f"MIG-{uuid}-{number}", f"MIG-GPU-{uuid}/{number}/0")
    return Gpu(index, f"{H100} MIG {profile}", (9, 0), ids)


SLICES = tuple(slice_of(0, "3g.40gb", number) for number in (1, 2))
SLICED = [
    Gpu(0, H100, (9, 0), ("GPU-aa11",), mig=True, slices=SLICES),
    Gpu(1, H100, (9, 0), ("GPU-bb22",)),
    Gpu(2, H100, (9, 0), ("GPU-cc33",), mig=True),
]


def indices(variable, machine=MACHINE):
    return [gpu.index for gpu in select(machine, variable).gpus]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 2, 1 ", [2, 1]),
        ("+1", [1]),
        # As C's strtoul reads them.
        ("1gpu,2b", [1, 2]),
        ("01", [1]),
        # The first entry that is no GPU ends the list.
        ("7", []),
        ("0,7,1", [0]),
        ("0,-1,1", [0]),
        ("-1", []),
        ("", []),
        (",0", []),
        ("0,,1", [0]),
        ("garbage", []),
        ("NoDevFiles", []),
        ("1,garbage,0", [1]),
        ("99999999999999999999", []),
        ("²", []),
        # One that comes twice hides all.
        ("1,1", []),
        ("0,1,0", []),
        ("1,01", []),
        (A, [0]),
        (f"{C},{A}", [2, 0]),
        ("GPU-bb", [2]),
        ("GPU-aa2,GPU-b", [1, 2]),
        # Two GPUs begin like this.
        ("GPU-aa", []),
        ("GPU-b,GPU-aa", [2]),
        ("GPU-", []),
        ("GPU-zz", []),
        (f"{A},GPU-aa11", []),
        (f"{A},", [0]),
        (f"{A},1", [0]),
        (f"1,{A}", [1]),
        ("gpu-aa11", []),
        ("MIG-aa11-1", []),
    ],
)
def test_a_value_selects_the_same_gpus_as_in_cuda(variable, expected):
    assert indices(variable) == expected


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        # One slice, and no whole GPU next to it.
        (None, [SLICES[0].name]),
        ("0", [SLICES[0].name]),
        ("1,0", [SLICES[0].name]),
        ("1", [H100]),
        ("1,2", [H100]),
        ("2", []),
        ("GPU-aa11", [SLICES[0].name]),
        ("MIG-nowhere", []),
    ],
)
def test_cuda_shows_one_slice_of_a_sliced_gpu(variable, expected):
    assert [gpu.name for gpu in select(SLICED, variable).gpus] == expected


@pytest.mark.parametrize("name", ["MIG-aa11-2", "MIG-GPU-aa11/2/0", "MIG-GPU-aa11/2"])
def test_a_slice_has_two_names(name):
    assert select(SLICED, name).gpus == (SLICES[1],)
    assert select(SLICED, f"{name},MIG-aa11-1").gpus == (SLICES[1],)
    assert select(SLICED, f"{name},{name}").gpus == ()


def test_a_remark_names_what_cuda_ignores():
    for variable in (None, "0", "2,1,0", "", "-1", "0,-1", A):
        assert select(MACHINE, variable).remark == ""
    assert "CUDA stops at '7', not one of this machine's 3 GPUs" in select(MACHINE, "7").remark
    assert "CUDA stops at 'garbage'" in select(MACHINE, "0,garbage").remark
    assert "names a GPU twice" in select(MACHINE, "0,0").remark
    assert "one MIG slice: " in select(SLICED, None).remark
    assert "MIG is on and has no slices on GPU 2" in select(SLICED, "2").remark
    assert select([], "7") == gpus.Selection(())


def test_a_remark_warns_of_the_order_of_different_gpus():
    unlike = [MACHINE[0], Gpu(1, "NVIDIA A100-SXM4-80GB", (8, 0), (B,))]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in select(unlike, "1").remark
    for variable, order in (("1", "PCI_BUS_ID"), (None, None), (A, None), ("", None)):
        assert select(unlike, variable, order).remark == ""


def test_a_slice_is_planned_with_its_own_memory_and_rates():
    whole = gpu_models.find_gpu(H100)
    part = gpu_models.find_gpu(f"{H100} MIG 3g.40gb")
    assert (part.name, part.memory_gb) == ("H100-80GB MIG 3g.40gb", 40)
    assert part.tflops == pytest.approx(whole.tflops * 3 / 7)
    assert gpu_models.find_gpu("NVIDIA A100-SXM4-40GB MIG 1c.2g.10gb").memory_gb == 10
    assert gpu_models.find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me").memory_gb == 10
    assert gpu_models.find_gpu("NVIDIA Unknown MIG 1g.10gb") is None


STAND_IN = """
class NVMLError(Exception):
    pass

NVML_DEVICE_MIG_ENABLE = 1
NAMES = ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"]

def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(NAMES)
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(index): return NAMES[index]
def nvmlDeviceGetUUID(index): return f"GPU-{index}{index}"
def nvmlDeviceGetCudaComputeCapability(index): return (8, 0) if index == 0 else (9, 0)
def nvmlDeviceGetMigMode(index): raise NVMLError
"""


@pytest.fixture
def two_kinds(tmp_path, monkeypatch):
    """A machine with an A100 and an H200, for those who ask its driver."""
    packages = tmp_path / "packages"
    (packages / "transformer_engine").mkdir(parents=True)
    (packages / "transformer_engine" / "__init__.py").touch()
    (packages / "pynvml.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.delenv(gpus.ORDER, raising=False)
    return Cosmos(tmp_path, fresh=True)


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("variable", "name", "warning"),
    [
        ("1", "H200", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ("GPU-11", "H200", ""),
        ("0", "A100-80GB", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ("7", None, "CUDA stops at '7'"),
        ("garbage", None, "CUDA stops at 'garbage'"),
        ("", None, ""),
    ],
)
def test_the_plan_is_for_the_visible_gpus(two_kinds, monkeypatch, variable, name, warning):
    monkeypatch.setenv(gpus.VARIABLE, variable)
    done = two_kinds("train", "tiny", "--plan", "--json")
    assert json.loads(done.stdout)["gpu"] == name
    assert (gpus.VARIABLE in done.stderr) == bool(warning)
    assert warning in done.stderr


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("variable", "code", "words"),
    [
        ("GPU-11", 4, "base weights are missing"),
        ("GPU-00", 3, "GPU 0, NVIDIA A100-SXM4-80GB, does not compute in fp8"),
        (
            "GPU-77",
            3,
            "fp8 needs a GPU, and none was found (CUDA_VISIBLE_DEVICES=GPU-77: CUDA stops",
        ),
    ],
)
def test_fp8_is_checked_on_the_visible_gpus(two_kinds, monkeypatch, variable, code, words):
    monkeypatch.setenv(gpus.VARIABLE, variable)
    fp8 = ("--set", "transformer_engine=linears", "--set", "global_batch_size=8")
    assert words in two_kinds("train", "nemo_assets", *fp8, code=code).stderr


def test_a_run_notes_the_gpus_that_it_used(tmp_path, monkeypatch):
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv(gpus.VARIABLE, "GPU-11,0")
    run = paths.Run(tmp_path / "run")
    launch._prepare(loading.load("tiny"), run)
    environment = files.read_json(run.root / "env.json")
    assert environment["gpus"] == ["NVIDIA H200"]
    assert environment["cuda_visible_devices"] == "GPU-11,0"
    monkeypatch.delitem(sys.modules, "pynvml")


def uuids_of_cuda():
    """The UUIDs that the driver itself enumerates, in its order."""
    driver = ctypes.CDLL("libcuda.so.1")
    count, found = ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return found
    for ordinal in range(count.value):
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetUuid_v2(uuid, device)
        found.append(bytes(uuid).hex())
    return found


@pytest.mark.gpu
def test_the_driver_selects_the_same_gpus():
    """On any machine with GPUs; two or more of one kind show the order too."""
    machine = gpus.of_machine()
    assert machine, "no GPU is here"
    whole = [gpu.ids[0] for gpu in machine]
    count = len(machine)
    values = [
        None, "", "-1", "0", " 0 ", "+0", "0a", "7", "99", "garbage", "0,0", "0,-1", "0,99", "0,x",
        "NoDevFiles", ",0", whole[-1], whole[-1][:12], f"{whole[0]},{whole[0]}", "GPU-", "GPU-zz",
        *(slice_.ids[0] for gpu in machine for slice_ in gpu.slices),
    ]  # fmt: skip
    if count > 1:
        reverse = ",".join(map(str, reversed(range(count))))
        values += ["1", "1,0", "0,1", reverse, f"1,{count},0", f"{whole[1]},{whole[0]}"]
        values += [f"1,{whole[0]}", f"{whole[1]},0", "1,0,1", "1,garbage,0"]
    wrong = []
    for value in values:
        clean = {key: text for key, text in os.environ.items() if key != gpus.VARIABLE}
        done = subprocess.run(
            [sys.executable, __file__],
            env=clean if value is None else clean | {gpus.VARIABLE: value},
            capture_output=True,
            text=True,
            check=True,
        )
        ours, cuda = json.loads(done.stdout)
        if ours != cuda:
            wrong.append((value, ours, cuda))
    assert not wrong


if __name__ == "__main__":
    shown = [gpu.ids[0].partition("-")[2].replace("-", "") for gpu in gpus.visible().gpus]
    print(json.dumps([shown, uuids_of_cuda()]))
