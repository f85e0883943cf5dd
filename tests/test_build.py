"""What is built and installed: the extension's symbols, the wheel, and the errors of a build that can't succeed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from setup_module import load_setup

from svag_fast import _C

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def dynamic_symbols(option: str) -> list[str]:
    """Return the names that the extension defines for others, or needs from them."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    lines = run("nm", "-D", option, _C.__file__).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def test_extension_shows_its_init_function_alone() -> None:
    assert dynamic_symbols("--defined-only") == ["PyInit__C"]


def test_extension_needs_nothing_of_torch() -> None:
    needed = dynamic_symbols("--undefined-only")
    assert any(name.startswith("Py") for name in needed)
    assert [name for name in needed if "torch" in name or "c10" in name or "at6Tensor" in name] == []


def test_extension_links_no_openmp_torch_or_shared_cudart() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    libraries = [line for line in run("readelf", "-d", _C.__file__).stdout.splitlines() if "(NEEDED)" in line]
    assert any("libstdc++" in line for line in libraries)
    assert [line for line in libraries if any(x in line for x in ("gomp", "omp5", "torch", "c10", "cudart"))] == []


# What `import svag_fast` must leave for when it is used.
HEAVY = ["matplotlib", "scipy", "sklearn", "click", "rich", "triton", "tensorboard", "torchsde"]


def test_import_loads_no_heavy_module() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import svag_fast; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    result = run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    added = result.stdout.split()
    assert "svag_fast" in added
    assert [name for name in added if name.split(".")[0] in HEAVY] == []
    assert len(added) < 50


def test_the_first_optimizer_and_its_step_do_not_import_the_compiler() -> None:
    script = (
        "import sys, torch, svag_fast; p = torch.nn.Parameter(torch.ones(3)); "
        "optimizer = svag_fast.SVAG([p], lr=0.1); p.sum().backward(); optimizer.step(); optimizer.state_dict(); "
        "print('torch._dynamo' in sys.modules, p.tolist()[0] < 1)"
    )
    assert run(sys.executable, "-c", script).stdout.split() == ["False", "True"]


def test_public_names_are_importable() -> None:
    import svag_fast

    assert [name for name in svag_fast.__all__ if not hasattr(svag_fast, name)] == []


def test_the_source_folder_is_no_installed_package_and_says_so(tmp_path: Path) -> None:
    """As it is found first by a Python that is started in a checkout, after `pip install .` there."""
    shutil.copytree(ROOT / "svag_fast", tmp_path / "svag_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]; import svag_fast"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: this svag_fast, in {tmp_path / 'svag_fast'}, is the source folder")
    assert "pip install -e ." in said


def test_kernels_are_importable_from_the_editable_install(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import svag_fast.kernels as k; print(k.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == "__init__.py"
    assert Path(result.stdout.strip()).parent.name == "kernels"


def build_extension(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder / "t", "--build-lib", folder / "l"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_missing_compiler_is_named_with_how_to_install_one(tmp_path: Path) -> None:
    result = build_extension(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "need a C++17 compiler, and 'no-such-compiler' was not found" in result.stderr
    assert "apt install g++" in result.stderr


def test_unknown_cuda_choice_is_an_error(tmp_path: Path) -> None:
    result = build_extension(tmp_path, SVAG_CUDA="yes")
    assert result.returncode != 0
    assert "SVAG_CUDA must be auto, 0 or 1, not 'yes'" in result.stderr


@pytest.mark.parametrize("number", ["0", "-1", "two", "2.5", "²"])
def test_number_of_compilers_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setenv("MAX_JOBS", number)
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a number of processes, at least 1, not '{number}'"):
        load_setup().max_jobs()


def test_compilers_run_at_once_as_many_as_max_jobs_says(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    for text, number in {"1": 1, " 64 ": 64, "": len(os.sched_getaffinity(0))}.items():
        monkeypatch.setenv("MAX_JOBS", text)
        assert setup.max_jobs() == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", None),
        ("  ", None),
        ("g++ -m64", ["g++", "-m64"]),
        (" ccache g++", ["ccache", "g++"]),
        ("{}/a b/g++", ["{}/a b/g++"]),
        ('ccache "{}/a b/g++" -g', ["ccache", "{}/a b/g++", "-g"]),
        ('"g++', 'CXX="g++: No closing quotation'),
        ("ccache", "CXX=ccache names no compiler. An example: CXX='ccache g++'"),
        ("/opt/sccache ccache", "names no compiler"),
    ],
)
def test_cxx_is_what_setuptools_can_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str] | str | None
) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "g++").symlink_to("/bin/true")
    (tmp_path / "ccache").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", text.format(tmp_path))
    setup = load_setup()
    from distutils.util import split_quoted  # setuptools' own, which has been imported

    if isinstance(words, str):
        with pytest.raises(SystemExit, match=re.escape(words)):
            setup.settle_cxx()
        return
    setup.settle_cxx()
    if words is None:
        assert "CXX" not in os.environ
    else:
        assert split_quoted(os.environ["CXX"]) == [word.format(tmp_path) for word in words]


def test_an_older_setuptools_compiles_with_cxx_too() -> None:
    """The GPU report builds with the setuptools that is there."""
    setup = load_setup()
    old = types.SimpleNamespace(compiler_cxx=["my g++", "-m64"], compiler_so=["ccache", "gcc", "-O2", "-fPIC"])
    setup.compile_with_cxx(old)
    assert old.compiler_so == ["my g++", "-m64", "-O2", "-fPIC"]
    new = types.SimpleNamespace(compiler_cxx=["g++"], compiler_so=["gcc"], compiler_so_cxx=["g++", "-fPIC"])
    setup.compile_with_cxx(new)
    assert new.compiler_so == ["gcc"]


def test_fast_mathematics_in_the_users_flags_is_turned_off() -> None:
    """It would lose the nans that a step looks for."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    setup = load_setup()

    def macros(*flags: str) -> str:
        command = [compiler, "-ffast-math", *flags, "-x", "c++", "-dM", "-E", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "__FINITE_MATH_ONLY__ 1" in macros("-O3")
    said = macros(*setup.CXX_FLAGS)
    assert "__FINITE_MATH_ONLY__ 1" not in said
    assert "__FAST_MATH__" not in said


def test_missing_launcher_and_the_compiler_behind_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "ccache").symlink_to("/bin/true")
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = build_extension(tmp_path, CXX="ccache no-such-compiler", PATH=path).stderr
    assert "'no-such-compiler' was not found" in said
    assert "'sccache' was not found" in build_extension(tmp_path, CXX="sccache g++", PATH=str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("command", "programs"),
    [
        (["g++", "-g"], ["g++"]),
        (["ccache", "g++", "-m64"], ["ccache", "g++"]),
        (["/usr/bin/ccache", "distcc", "/opt/my gcc/g++"], ["/usr/bin/ccache", "distcc", "/opt/my gcc/g++"]),
        (["ccache"], ["ccache"]),
    ],
)
def test_the_compiler_is_found_behind_its_launchers(command: list[str], programs: list[str]) -> None:
    assert load_setup().compiler_of(command) == programs


# In nvcc's place: knows the architectures in ARCHS, logs its calls, and fails to compile where FAIL is set.
NVCC = """#!/bin/sh
printf '%s|' "$@" >> "$LOG"; echo >> "$LOG"
case "$1" in
    --list-gpu-arch) for a in $ARCHS; do echo "compute_$a"; done; exit ;;
    --dryrun) echo "#\\$ LIBRARIES=  \\"-L$TOP/stubs\\" \\"-L$TOP/lib\\"" >&2; exit ;;
esac
[ -z "$FAIL" ] || { echo "In file included from x:"; echo "$FAIL"; echo "the end"; exit 1; } >&2
"""


class Toolkit:
    """A CUDA folder, of a name with a space, and setup.py as it sees nothing else of CUDA."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.setup, self.monkeypatch = folder / "a b" / "cuda", load_setup(), monkeypatch
        self.log = folder / "log"
        for name in ("bin", "lib"):
            (self.top / name).mkdir(parents=True)
        (self.top / "lib" / "libcudart_static.a").touch()
        self.nvcc = self.top / "bin" / "nvcc"
        self.nvcc.write_text(NVCC)
        self.nvcc.chmod(0o755)
        monkeypatch.setattr(self.setup, "CUDA_FOLDERS", [])
        for name in ("CUDA_HOME", "CUDA_PATH", "SVAG_CUDA", "SVAG_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        variables = {"PATH": "/usr/bin:/bin", "LOG": str(self.log), "TOP": str(self.top), "FAIL": ""}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    def choose(self, archs: str = "80 90 100 120", **environment: str) -> Any:
        for name, value in {"CUDA_HOME": str(self.top), "ARCHS": archs, **environment}.items():
            self.monkeypatch.setenv(name, value)
        return self.setup.choose_cuda("my-g++")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("/usr/bin has an nvcc")
    return Toolkit(tmp_path, monkeypatch)


def test_nvcc_is_found_on_the_path_in_cuda_home_and_in_the_usual_folder(toolkit: Toolkit) -> None:
    assert toolkit.choose().nvcc == str(toolkit.nvcc)
    assert toolkit.choose(CUDA_HOME="", PATH=f"/usr/bin:/bin:{toolkit.nvcc.parent}").nvcc == str(toolkit.nvcc)
    assert toolkit.choose(CUDA_HOME="", PATH="/usr/bin:/bin") is None
    toolkit.monkeypatch.setattr(toolkit.setup, "CUDA_FOLDERS", [str(toolkit.nvcc.parent)])
    found = toolkit.choose(CUDA_HOME="")
    assert found.nvcc == str(toolkit.nvcc)
    assert found.libraries() == [str(toolkit.top / "lib")]
    assert "-ccbin|my-g++|" in toolkit.log.read_text()


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_the_cuda_folder_that_is_named_goes_before_the_path(toolkit: Toolkit, tmp_path: Path, name: str) -> None:
    """As for PyTorch's extensions: of two toolkits it says which one is meant."""
    other = tmp_path / "nvcc"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    environment = {"CUDA_HOME": "", "PATH": f"{tmp_path}:/usr/bin:/bin", name: str(toolkit.top)}
    assert toolkit.choose(**environment).nvcc == str(toolkit.nvcc)


@pytest.mark.parametrize(
    ("known", "asked", "built"),
    [
        ("75 80 90 100 120 121", "", "80 90 100 120"),
        ("50 60 70 80 86 89 90", "", "80 90"),  # CUDA 12.0 to 12.7
        ("100 110 120", "", "100 120"),
        ("75 80 90", "90 75", "75 90"),
        ("80 90 100", "100 90a 80", "80 90a 100"),
    ],
)
def test_what_nvcc_knows_is_built_and_the_newest_kept_as_ptx(
    toolkit: Toolkit, known: str, asked: str, built: str
) -> None:
    found = toolkit.choose(known, SVAG_CUDA_ARCHS=asked)
    assert found.archs == built.split()
    command = found.command("x.cu", "x.o", found.archs)
    codes = [word.rpartition("code=")[2] for word in command if "-gencode" in word]
    assert codes == [*(f"sm_{a}" for a in found.archs), f"compute_{found.archs[-1]}"]


REASONS = {
    "no nvcc": ({"CUDA_HOME": ""}, "nvcc is neither in $CUDA_HOME/bin nor on the PATH"),
    "old": ({"ARCHS": "50 70"}, "knows none of 80, 90, 100, 120; SVAG_CUDA_ARCHS chooses among its 50, 70"),
    "mute": ({"ARCHS": ""}, "nvcc --list-gpu-arch says nothing of use: exit status 0"),
    "host": ({"FAIL": "x.h: error: unsupported GNU version"}, "host compiler my-g++, can't compile: x.h: error: unsup"),
    "runtime": ({"TOP": "/nowhere"}, "libcudart_static.a is in none of"),
}


@pytest.mark.parametrize("case", [*REASONS, "not run"])
def test_where_cuda_can_not_be_built_auto_says_why_and_1_fails(
    toolkit: Toolkit, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    environment, reason = REASONS.get(case, ({}, "can't be run"))
    if case == "not run":
        toolkit.nvcc.write_text("#!/no/such/interpreter\n")
    assert toolkit.choose(**{"archs": environment.get("ARCHS", "80"), **environment}) is None
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("svag_fast: building the CPU kernels only: ")
    assert reason in said[0]
    with pytest.raises(SystemExit, match="SVAG_CUDA=1, but ") as error:
        toolkit.choose(**{"archs": environment.get("ARCHS", "80"), **environment}, SVAG_CUDA="1")
    assert reason in str(error.value)


@pytest.mark.parametrize("asked", ["80 70 60", "8.0", "sm_80"])
def test_an_architecture_that_nvcc_does_not_know_is_refused_by_name(toolkit: Toolkit, asked: str) -> None:
    unknown = ", ".join(a for a in asked.split() if a != "80")
    for wanted in ("auto", "1"):
        with pytest.raises(SystemExit, match=f"doesn't know {unknown}; it knows 80, 90$"):
            toolkit.choose("80 90", SVAG_CUDA_ARCHS=asked, SVAG_CUDA=wanted)


def test_without_cuda_nvcc_is_not_asked(toolkit: Toolkit) -> None:
    assert toolkit.choose(SVAG_CUDA="0") is None
    assert not toolkit.log.exists()


@pytest.mark.nightly
def test_tree_nvcc_and_build_folder_may_have_spaces_in_their_paths_behind_a_launcher(tmp_path: Path) -> None:
    """CUDA for one architecture; the C++ unoptimised, by a launcher that logs."""
    nvcc = shutil.which("nvcc")
    tree = tmp_path / "a tree"
    tree.mkdir()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    launcher, log = tmp_path / "ccache", tmp_path / "log"
    launcher.write_text(f'#!/bin/sh\necho x >> "{log}"; exec "$@" -O0\n')
    launcher.chmod(0o755)
    environment = {**os.environ, "CXX": f"{launcher} g++", "SVAG_CUDA": "0"}
    if nvcc is not None:
        home = run(nvcc, "--dryrun", "x.cu").stderr.split("#$ _HERE_=")[1].splitlines()[0]
        (tmp_path / "a cuda").symlink_to(Path(home).parent)
        path = f"{tmp_path / 'a cuda' / 'bin'}:{os.environ['PATH']}"
        environment |= {"PATH": path, "SVAG_CUDA": "1", "SVAG_CUDA_ARCHS": "80"}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "a t", "--build-lib", tmp_path / "l"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(log.read_text().split()) >= 20
    (module,) = (tmp_path / "l").rglob("_C.*.so")
    code = f"import importlib.util as u; s = u.spec_from_file_location('svag_fast._C', {str(module)!r})"
    code += "; m = u.module_from_spec(s); s.loader.exec_module(m); print(hasattr(m, 'cuda_step'))"
    assert run(sys.executable, "-c", code).stdout.strip() == str(nvcc is not None)
