# What demo and test share, sourced by both: finds Python, checks the disk, keeps .venv beside pyproject.toml.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMP="$VENV/.installed" # first line: for what it was installed; second: the extras
export HOME="${HOME:-$VENV}" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

step() { printf '==> %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the first Python that will do; fails naming those that will not.
find_python() {
    local candidate version seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python; do
        command -v "$candidate" >/dev/null || continue
        version="$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)" || continue
        case "$version" in
            3.11.* | 3.12.*)
                if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
                    printf '%s\n' "$candidate"
                    return
                fi
                version="$version without its venv module (Debian: apt install python3-venv)"
                ;;
        esac
        seen="${seen:+$seen, }$candidate is $version"
    done
    fail "Python 3.11 or 3.12 is needed; found: ${seen:-none}." \
        "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# check_disk MIB: fails where less is free.
check_disk() {
    local free
    free="$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1024) }')"
    [ "$free" -ge "$1" ] || fail "the disk is too full: $ROOT has $free MiB free and the packages need $1 MiB." \
        "Free some space, or put the repository on another disk."
}

# prepare_environment EXTRA...: .venv with this package and these extras. Quick when nothing has changed; extras
# that are there already stay, so that demo and test never undo each other's work.
prepare_environment() {
    local made_for python installed="" wanted need=500
    made_for="$(cksum <"$ROOT/pyproject.toml") $ROOT"
    [ -f "$STAMP" ] && installed="$(sed -n 2p "$STAMP")"
    wanted="$(printf '%s\n' $installed "$@" | sort -u | xargs)"
    if [ -f "$STAMP" ] && [ "$(sed -n 1p "$STAMP")" = "$made_for" ] && [ "$wanted" = "$installed" ]; then
        return
    fi

    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || exit 1
        check_disk 100
        step "Making .venv with $("$python" --version)"
        "$python" -m venv --clear "$VENV" || fail "$python cannot make $VENV; the lines above say why"
    fi
    case " $wanted " in *" train "*) need=9000 ;; esac
    case " $installed " in *" train "*) need=500 ;; esac
    check_disk "$need"
    step "Installing packages${wanted:+ with the extras: $wanted} (needs $need MiB of disk; the first time takes minutes)"
    # pip unpacks on the disk that was checked: /tmp may be a small one. It compiles nothing: that takes a quarter of the
    # time, and Python compiles what it imports.
    mkdir -p "$VENV/tmp"
    if ! TMPDIR="$VENV/tmp" "$VENV/bin/python" -m pip install --quiet --no-compile -e "$ROOT${wanted:+[${wanted// /,}]}" \
        >"$VENV/install.log" 2>&1; then
        tail -n 20 "$VENV/install.log" >&2
        rm -rf "$VENV/tmp"
        grep -q "No space left" "$VENV/install.log" && fail "the disk became full while packages were installed." \
            "Free about $need MiB and run this again; it goes on from there."
        fail "pip could not install the packages; the lines above say why. Run this again when that is mended."
    fi
    rm -rf "$VENV/tmp"
    printf '%s\n%s\n' "$made_for" "$wanted" >"$STAMP"
}
