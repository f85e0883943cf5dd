#!/bin/sh
# environment.sh packages|install|peers VENV: make the development environment VENV; called by the Makefile.
#   packages  the pinned packages of dev.txt; from scratch, unless VENV was finished before
#   install   svag_fast itself, editable, compiled with build isolation
#   peers     what the benches run beside svag_fast, pinned in bench.txt
# VENV/.packages, .installed and .peers say that a step is finished; VENV.unfinished, that the packages were begun.
# A step that failed or was killed starts from its beginning: nothing half-made is used.
set -eu
step=$1
venv=$2
python=${PYTHON:-python3}
here=$(dirname "$0")

fail() {
    echo "svag_fast: $1" >&2
    exit 1
}

check_tools() {
    command -v "$python" >/dev/null || fail "no '$python' on the PATH. Install Python 3.10 or newer \
(Debian, Ubuntu: apt install python3 python3-venv python3-dev) or name yours: make PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed, and '$python' is $("$python" --version 2>&1). \
Name a newer one: make PYTHON=/path/to/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "'$python' has no module venv (or ensurepip). \
Install it (Debian, Ubuntu: apt install python3-venv) or name another Python: make PYTHON=/path/to/python3"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        fail "'$python' comes without Python.h, which compiling needs. \
Install it (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
    # CXX may hold a launcher, options and quotes, so it is tried. setup.py splits it in the same way.
    "$python" -c '
import os, shlex, shutil, subprocess, sys
text = os.environ.get("CXX", "").strip() or "g++"
program = "int main() { if constexpr (sizeof(int) > 1) return 0; }"
try:
    words = [text] if shutil.which(text) else shlex.split(text)
    command = [*words, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    why = done.returncode and (done.stderr.strip().splitlines() or ["exit status %d" % done.returncode])[0]
except (OSError, ValueError) as error:
    why = error
sys.exit(why and "svag_fast: the C++ compiler CXX=%s does not compile C++17: %s" % (text, why))' ||
        fail "Install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) \
or name yours: make CXX=clang++"
}

packages() {
    if [ ! -e "$venv/.packages" ]; then
        if [ -e "$venv" ] && [ ! -e "$venv.unfinished" ]; then
            fail "'$venv' exists and was not made by this Makefile. Remove it, or name another folder: make VENV=env"
        fi
        touch "$venv.unfinished"
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
    touch "$venv.unfinished"
    rm -f "$venv/.packages" "$venv/.installed" "$venv/.peers"
    "$venv/bin/python" -m pip install --disable-pip-version-check --upgrade -r "$here/dev.txt"
    touch "$venv/.packages"
    rm "$venv.unfinished"
}

install() {
    rm -f "$venv/.installed"
    # The build's own environment follows the pins as well: older pips read the one, newer ones the other.
    PIP_CONSTRAINT=$here/dev.txt PIP_BUILD_CONSTRAINT=$here/dev.txt \
        "$venv/bin/python" -m pip install --disable-pip-version-check --editable '.[test,lint]'
    touch "$venv/.installed"
}

peers() {
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/bench.txt" -c "$here/dev.txt"
    touch "$venv/.peers"
}

check_tools
"$step"
