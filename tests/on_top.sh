# For the scripts beside it: environments with packages of their own on top of those of .venv.
# shellcheck shell=bash

usual=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv

# put_on_top FOLDER: let an environment import the packages of .venv that it does not have
put_on_top() {
    local ours theirs
    ours=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    theirs=$("$usual/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # packages of this environment come first, all others are those of .venv
    echo "import site; site.addsitedir('$theirs')" >"$ours/usual.pth"
}

# make_on_top FOLDER: such an environment without packages of its own, in place of what is there
make_on_top() {
    "$usual/bin/python" -m venv --clear "$1"
    put_on_top "$1"
}

# install_into FOLDER ARGUMENTS...: pip install there
install_into() {
    local venv=$1
    shift
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
