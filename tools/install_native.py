#!/usr/bin/env python3
"""Build and install fast_rnnt or kaldifeat for the torch that is installed.

Both are source packages. As they stand, their CMake files download pybind11,
ask for C++14 and demand a CUDA toolkit when torch was built with CUDA. This
script answers all three from outside, without a download and without a patch:

- a folder that stands in for the pybind11 download and finds the installed one,
- a small ``TorchConfig.cmake`` that names the installed torch's own libraries,
- the C++ standard that this torch's headers need.

The builds are for the CPU: fast_rnnt then refuses tensors on a GPU.

Usage:
  python tools/install_native.py fast_rnnt
  python tools/install_native.py fast_rnnt kaldifeat
  python tools/install_native.py --force fast_rnnt   # build again
  python tools/install_native.py --check k2          # only try it, build nothing
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# CMAKE_FIND_PACKAGE_TARGETS_GLOBAL, used below, came with this one.
MIN_CMAKE = (3, 24)

# setuptools has bdist_wheel of its own from 70.1 on; 81 warns about and later
# ones lack pkg_resources, which older packages in the environment may import.
BUILD_REQUIREMENTS = {
    "pybind11": "pybind11>=2.12",
    "setuptools": "setuptools>=70.1,<81",
    "wheel": "wheel",
}

CHECK_FAST_RNNT = """
import torch
import fast_rnnt

torch.manual_seed(0)
N, T, S, C = 2, 7, 3, 5
am = torch.randn(N, T, C, requires_grad=True)
lm = torch.randn(N, S + 1, C, requires_grad=True)
symbols = torch.randint(1, C, (N, S))
boundary = torch.tensor([[0, 0, S, T], [0, 0, S - 1, T - 2]])
simple, (px_grad, py_grad) = fast_rnnt.rnnt_loss_simple(
    lm=lm, am=am, symbols=symbols, termination_symbol=0,
    boundary=boundary, reduction="sum", return_grad=True,
)
ranges = fast_rnnt.get_rnnt_prune_ranges(
    px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=2
)
am_pruned, lm_pruned = fast_rnnt.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
pruned = fast_rnnt.rnnt_loss_pruned(
    logits=am_pruned + lm_pruned, symbols=symbols, ranges=ranges,
    termination_symbol=0, boundary=boundary, reduction="sum",
)
(simple + pruned).backward()
for x in (simple, pruned, am.grad, lm.grad):
    assert torch.isfinite(x).all(), "a loss or gradient is not finite"
"""

CHECK_K2 = CHECK_FAST_RNNT.replace("fast_rnnt", "k2")

CHECK_KALDIFEAT = """
import torch
import kaldifeat

torch.manual_seed(0)
opts = kaldifeat.FbankOptions()
opts.frame_opts.dither = 0
opts.mel_opts.num_bins = 80
features = kaldifeat.Fbank(opts)(torch.randn(16000))
assert features.shape == (98, 80), f"the shape is {tuple(features.shape)}"
assert torch.isfinite(features).all(), "a feature is not finite"
"""


class InstallError(Exception):
    """What went wrong and what to do, in one sentence."""


@dataclass
class Package:
    pin: str  # what pip is asked for
    check: str  # Python code that fails unless the package works
    cmake_env: str  # the variable in which its setup.py looks for CMake arguments
    cmake_args: tuple[str, ...]
    seconds: int  # build time on 2 cores


PACKAGES: dict[str, Package] = {
    "fast_rnnt": Package(
        pin="fast_rnnt==1.3",
        check=CHECK_FAST_RNNT,
        cmake_env="FT_CMAKE_ARGS",
        cmake_args=("-DFT_BUILD_TESTS=OFF", "-DFT_WITH_CUDA=OFF"),
        seconds=40,
    ),
    "kaldifeat": Package(
        pin="kaldifeat==1.24",
        check=CHECK_KALDIFEAT,
        cmake_env="KALDIFEAT_CMAKE_ARGS",
        # The two folders are what pybind11's own CMake project would have set;
        # without them the module does not find libkaldifeat_core.so at import.
        cmake_args=(
            "-Dkaldifeat_BUILD_TESTS=OFF",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DCMAKE_INSTALL_INCLUDEDIR=include",
        ),
        seconds=150,
    ),
}

CHECKS: dict[str, str] = {
    "k2": CHECK_K2,
    **{name: package.check for name, package in PACKAGES.items()},
}

# A name for --check: cmake, make, a compiler, Python's header and pip.
BUILD_TOOLS = "build-tools"


@dataclass
class Torch:
    version: str  # such as 2.7.1+cu126
    folder: str  # where torch/__init__.py lies
    cxx11_abi: bool

    @property
    def cxx_standard(self) -> int:
        """The C++ standard that its headers need."""
        match = re.match(r"(\d+)\.(\d+)", self.version)
        if match is None:
            raise InstallError(
                f"The torch version {self.version!r} cannot be read; install a "
                "released torch."
            )
        return 20 if (int(match[1]), int(match[2])) >= (2, 13) else 17


def last_line(text: str) -> str:
    """Return the last line of ``text`` that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no output"


def try_package(name: str) -> str | None:
    """Run the check of `name` in a fresh process.

    It runs in sys.prefix, where no folder is called torch or k2 and shadows the
    package.

    Returns:
      None if it works, else the reason why it does not.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHECKS[name]],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=sys.prefix,
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"it dies of signal {-done.returncode}"
    return last_line(done.stderr)


def find_torch() -> Torch:
    code = (
        "import json, os, torch;"
        "print(json.dumps([torch.__version__, os.path.dirname(torch.__file__),"
        "bool(torch.compiled_with_cxx11_abi())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=sys.prefix,
    )
    if done.returncode == 0:
        return Torch(*json.loads(last_line(done.stdout)))
    reason = last_line(done.stderr)
    if "No module named 'torch'" in reason:
        raise InstallError(
            f"torch is not installed for {sys.executable}; install it first with "
            f"'{sys.executable} -m pip install torch'."
        )
    raise InstallError(
        f"torch is installed for {sys.executable} but cannot be imported "
        f"({reason}); repair or reinstall it first."
    )


def find_tools() -> None:
    """Refuse early when something that the build needs is missing."""
    if not sys.platform.startswith("linux"):
        raise InstallError(
            f"This script builds on Linux and this is {sys.platform}; install the "
            "package by hand, following its own documentation."
        )
    cmake = shutil.which("cmake")
    if cmake is None:
        raise InstallError(
            "cmake is not on the PATH; install it with "
            f"'{sys.executable} -m pip install cmake' or your system's package "
            "manager."
        )
    done = subprocess.run(
        [cmake, "--version"], capture_output=True, encoding="utf-8", errors="replace"
    )
    match = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if match is None:
        raise InstallError(
            f"{cmake} does not run; install a working one with "
            f"'{sys.executable} -m pip install cmake'."
        )
    if (int(match[1]), int(match[2])) < MIN_CMAKE:
        raise InstallError(
            f"{cmake} is version {match[1]}.{match[2]} and "
            f"{MIN_CMAKE[0]}.{MIN_CMAKE[1]} or newer is needed; install one with "
            f"'{sys.executable} -m pip install cmake'."
        )
    if "CXX" in os.environ:
        compilers = [(shlex.split(os.environ["CXX"]) or [""])[0]]
    else:
        compilers = ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise InstallError(
            f"No C++ compiler ({', '.join(compilers)}) is on the PATH; install "
            "one, for example the package g++ of your system."
        )
    if shutil.which("make") is None:
        raise InstallError(
            "make is not on the PATH; install the package make of your system."
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise InstallError(
            f"Python's header {header} is missing; install your system's package "
            "for it, for example python3-dev."
        )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True
    )
    if done.returncode != 0:
        raise InstallError(
            f"{sys.executable} has no pip; run '{sys.executable} -m ensurepip'."
        )


def explain(what: str, log: Path) -> InstallError:
    """The sentence for a pip command that failed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "externally-managed-environment" in text:
        return InstallError(
            f"{sys.executable} belongs to the system, which lets pip install "
            "nothing; use a virtual environment, for example tools/make_env.sh."
        )
    if "No space left on device" in text:
        return InstallError(
            f"The disk is full, so {what} is not installed; free some space in "
            f"{sys.prefix} and {tempfile.gettempdir()} (the log is {log})."
        )
    if "No matching distribution found" in text or "HTTPSConnectionPool" in text:
        return InstallError(
            f"pip cannot get {what} from the package index; check the network and "
            f"pip's index settings (the log is {log})."
        )
    if "Killed" in text:
        return InstallError(
            f"The compiler was killed while it built {what}, most likely for want of "
            f"memory; try again with MAKEFLAGS=-j1 (the log is {log})."
        )
    match = re.search(r"^.*\b(?:CMake Error|error:).*$", text, re.MULTILINE)
    reason = f" ({match[0].strip().rstrip('.:')})" if match else ""
    return InstallError(
        f"The build of {what} failed{reason}; mend what the log {log} names and run "
        "the same command again."
    )


def pip_install(args: list[str], what: str, env: dict[str, str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as f:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *args],
            stdout=f,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
        )
    if done.returncode != 0:
        raise explain(what, log)


def install_build_requirements(env: dict[str, str], log: Path) -> None:
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    missing = []
    for name, requirement in BUILD_REQUIREMENTS.items():
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        minimum = re.search(r">=(\d+)\.(\d+)", requirement)
        version = re.match(r"(\d+)\.(\d+)", done.stdout)
        if version is None:
            missing.append(requirement)
        elif minimum is not None:
            if tuple(map(int, version.groups())) < tuple(map(int, minimum.groups())):
                missing.append(requirement)
    if missing:
        print(f"==> installing {', '.join(missing)} (about 5 s)", flush=True)
        pip_install(["-q", *missing], " and ".join(missing), env, log)


def write_shims(folder: Path, torch: Torch) -> list[str]:
    """Write the CMake files that stand in for pybind11's and torch's own.

    Returns:
      The CMake arguments that bring them into use.
    """
    pybind11 = folder / "pybind11"
    pybind11.mkdir()
    (pybind11 / "CMakeLists.txt").write_text(
        "set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)\n"
        "find_package(pybind11 CONFIG REQUIRED)\n",
        encoding="utf-8",
    )
    config = folder / "torch"
    config.mkdir()
    (config / "TorchConfig.cmake").write_text(
        f"""\
set(TORCH_FOUND TRUE)
set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}")
set(TORCH_INCLUDE_DIRS
  "{torch.folder}/include"
  "{torch.folder}/include/torch/csrc/api/include"
)
set(TORCH_LIBRARIES)
foreach(name c10 torch_cpu torch)
  list(APPEND TORCH_LIBRARIES "{torch.folder}/lib/lib${{name}}.so")
endforeach()
include_directories(SYSTEM
  ${{TORCH_INCLUDE_DIRS}}
  "{sysconfig.get_path("include")}"
)
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        raise InstallError(
            f"The installed pybind11 does not run ({last_line(done.stderr)}); "
            f"reinstall it with '{sys.executable} -m pip install "
            "--force-reinstall pybind11'."
        )
    return [
        f"-DFETCHCONTENT_SOURCE_DIR_PYBIND11={pybind11}",
        f"-Dpybind11_DIR={done.stdout.strip()}",
        f"-DTorch_DIR={config}",
    ]


def build(name: str, torch: Torch) -> None:
    package = PACKAGES[name]
    jobs = len(os.sched_getaffinity(0))
    env = dict(os.environ)
    env.setdefault("MAKEFLAGS", f"-j{jobs}")
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs))
    env["CMAKE_GENERATOR"] = "Unix Makefiles"  # their setup.py calls make
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"

    handle, log_name = tempfile.mkstemp(prefix=f"install_{name}_", suffix=".log")
    os.close(handle)
    log = Path(log_name)

    install_build_requirements(env, log)
    print(
        f"==> building {package.pin} for torch {torch.version} "
        f"(about {package.seconds} s on 2 cores; log: {log})",
        flush=True,
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"build_{name}_") as folder:
        cmake_args = [
            *write_shims(Path(folder), torch),
            *package.cmake_args,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_STANDARD={torch.cxx_standard}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
        ]
        env[package.cmake_env] = " ".join(map(shlex.quote, cmake_args))
        # --no-cache-dir: a wheel built for one torch must not serve another.
        flags = ["-v", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
        flags += ["--force-reinstall", "--no-binary", name]
        pip_install([*flags, package.pin], package.pin, env, log)

    reason = try_package(name)
    if reason is not None:
        raise InstallError(
            f"{package.pin} was built but does not work ({reason}); see {log}, and "
            "check that torch and the compiler belong to this environment."
        )
    log.unlink()
    seconds = time.monotonic() - start
    print(f"==> {name} is installed and works ({seconds:.0f} s)", flush=True)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(
            "Build and install fast_rnnt or kaldifeat in this Python environment, "
            "for the torch that is installed in it."
        )
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        choices=sorted([*CHECKS, BUILD_TOOLS]),
        help=f"fast_rnnt or kaldifeat; with --check also k2 or {BUILD_TOOLS}",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--force",
        action="store_true",
        help="build again even if the package is there and works",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="build nothing, only try: status 0 if all of them work, else 1",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    # A cmake that pip installed lies beside the interpreter.
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])

    for name in args.names:
        if args.check and name == BUILD_TOOLS:
            find_tools()
            print("==> the tools to build with are there")
            continue
        if args.check:
            reason = try_package(name)
            if reason is not None:
                remedy = (
                    f"run 'python tools/install_native.py {name}'"
                    if name in PACKAGES
                    else "run tools/make_k2_env.sh for an environment that has it"
                )
                raise InstallError(f"{name} does not work ({reason}); {remedy}.")
            print(f"==> {name} works")
            continue
        if name not in PACKAGES:
            raise InstallError(
                f"{name} can only be checked here; add --check, or name "
                f"{' or '.join(PACKAGES)}."
            )
        if not args.force and try_package(name) is None:
            print(f"==> {name} is already installed and works; nothing to do")
            continue
        torch = find_torch()
        find_tools()
        build(name, torch)


if __name__ == "__main__":
    try:
        main()
    except InstallError as e:
        print(e, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again.", file=sys.stderr)
        sys.exit(130)
