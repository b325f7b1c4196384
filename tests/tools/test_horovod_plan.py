"""Which Horovod is built: for the CPU unless NCCL was asked for, and an error of one line where NCCL cannot be had."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tools.horovod_plan import BuildError, Machine, look, main, plan

MakeToolkit = Callable[..., Path]


@pytest.fixture
def make_toolkit(tmp_path: Path) -> MakeToolkit:
    """Makes a folder as of a CUDA toolkit, without some of its files."""

    def make(*lacks: str, version: int = 13000) -> Path:
        folder = tmp_path / "cuda"
        for name in ("bin/nvcc", "include/cuda_runtime_api.h", "targets/x86_64-linux/lib/libcudart.so"):
            if name.split("/")[-1] not in lacks:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"#define CUDART_VERSION  {version}\n")
        return folder

    return make


def machine(*toolkits: Path, torch_cuda: str | None = "13.0", nccl: Path | None = None) -> Machine:
    nccl_folders = [nccl] if nccl else []
    return Machine(torch_cuda=torch_cuda, toolkits=toolkits, nccl_includes=nccl_folders, nccl_libs=nccl_folders)


@pytest.fixture
def nccl(tmp_path: Path) -> Path:
    folder = tmp_path / "nccl"
    folder.mkdir()
    for name in ("nccl.h", "libnccl.so.2"):
        (folder / name).touch()
    return folder


class TestNotAskedFor:
    @pytest.mark.parametrize("asked", ["", "CPU"])
    def test_the_three_machines(self, make_toolkit: MakeToolkit, asked: str) -> None:
        incomplete = make_toolkit("cuda_runtime_api.h", "libcudart.so")
        notes = []
        for each in (machine(), machine(incomplete), machine(torch_cuda=None)):
            chosen = plan(asked, each)
            assert (chosen.operations, chosen.settings) == ("CPU", {})
            assert chosen.note.startswith("Horovod: built for the CPU") and "\n" not in chosen.note
            notes.append(chosen.note)
        assert "no CUDA toolkit was found" in notes[0]
        assert f"({incomplete} has no include/cuda_runtime_api.h)" in notes[1]
        assert "as the installed torch is" in notes[2]
        assert all("HOROVOD_GPU_OPERATIONS=NCCL make install" in each for each in notes[:2])

    def test_a_complete_toolkit_is_left_alone(self, make_toolkit: MakeToolkit, nccl: Path) -> None:
        chosen = plan("", machine(make_toolkit(), nccl=nccl))
        assert (chosen.operations, chosen.settings) == ("CPU", {})
        assert "NCCL was not asked for" in chosen.note


class TestAskedFor:
    def test_is_built_with_the_toolkit_and_nccl_that_were_found(self, make_toolkit: MakeToolkit, nccl: Path) -> None:
        chosen = plan("NCCL", machine(Path("/nowhere"), make_toolkit(), nccl=nccl))
        assert chosen.operations == "NCCL"
        assert chosen.settings == {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(make_toolkit()),
            "CUDA_HOME": str(make_toolkit()),
            "HOROVOD_NCCL_INCLUDE": str(nccl),
            "NCCL_LIBRARY": str(nccl / "libnccl.so.2"),
        }

    @pytest.mark.parametrize(
        ("lacks", "told"),
        [
            (["nvcc"], "has no bin/nvcc"),
            (["cuda_runtime_api.h"], "has no include/cuda_runtime_api.h"),
            (["libcudart.so"], "has no libcudart.so"),
        ],
    )
    def test_an_incomplete_toolkit_is_an_error(
        self, make_toolkit: MakeToolkit, nccl: Path, lacks: list[str], told: str
    ) -> None:
        toolkit = make_toolkit(*lacks)
        with pytest.raises(BuildError, match=f"NCCL: no complete CUDA toolkit was found .{toolkit} {told}"):
            plan("NCCL", machine(toolkit, nccl=nccl))

    def test_a_toolkit_of_another_version_is_an_error(self, make_toolkit: MakeToolkit, nccl: Path) -> None:
        with pytest.raises(BuildError, match=r"is CUDA 12, torch is built for CUDA 13\.0"):
            plan("NCCL", machine(make_toolkit(version=12040), nccl=nccl))

    def test_what_else_may_be_missing(self, make_toolkit: MakeToolkit, nccl: Path) -> None:
        with pytest.raises(BuildError, match=r"nccl\.h was not found.*HOROVOD_NCCL_HOME"):
            plan("NCCL", machine(make_toolkit()))
        (nccl / "libnccl.so.2").unlink()
        with pytest.raises(BuildError, match=r"libnccl\.so was not found"):
            plan("NCCL", machine(make_toolkit(), nccl=nccl))
        with pytest.raises(BuildError, match="NCCL: no CUDA toolkit was found"):
            plan("NCCL", machine(nccl=nccl))
        with pytest.raises(BuildError, match="torch is a build for the CPU"):
            plan("NCCL", machine(make_toolkit(), torch_cuda=None, nccl=nccl))

    def test_an_unknown_word_is_an_error(self) -> None:
        with pytest.raises(BuildError, match="HOROVOD_GPU_OPERATIONS=MPI: it should be NCCL, or CPU"):
            plan("MPI", machine())


def test_a_toolkit_that_is_named_is_the_only_one(make_toolkit: MakeToolkit) -> None:
    incomplete = make_toolkit("libcudart.so")
    assert look({"CUDA_HOME": str(incomplete), "PATH": "/usr/bin"}).toolkits == [incomplete]
    on_path = look({"PATH": str(incomplete / "bin")}).toolkits
    assert incomplete not in on_path, "its nvcc is no program"
    (incomplete / "bin" / "nvcc").chmod(0o755)
    assert look({"PATH": str(incomplete / "bin")}).toolkits[0] == incomplete


def test_an_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"HOROVOD_GPU_OPERATIONS": "NCCL", "CUDA_HOME": str(tmp_path), "PATH": "/usr/bin"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main()
    said = str(ended.value.code)  # what Python prints as the process ends with 1
    assert said.startswith("HOROVOD_GPU_OPERATIONS=NCCL: ") and "\n" not in said
    assert capsys.readouterr() == ("", "")
