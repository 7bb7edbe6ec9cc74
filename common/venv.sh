# Sourced by run_train_clip.sh and tests/run.sh: a virtual environment that fits the requirements files given, whose
# paths start at this program's folder. VENV: where it lies (default .venv in that folder).
# PYTHON: what makes it (default python3, 3.10 or newer). Afterwards $PY is its interpreter.

ensure_venv() {
    local root venv python="${PYTHON:-python3}" file stamp begun
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${VENV:-$root/.venv}"
    begun="${venv%/}.begun" # there while $venv is being made: what an interruption left of it may be cleared
    PY="$venv/bin/python"
    if "$PY" -c 'import pip' 2>/dev/null && { [ ! -e "$begun" ] ||
        "$PY" -c 'from importlib.metadata import version; version("pip")' 2>/dev/null; }; then # it is written last
        rm -f "$begun"
    elif [ -e "$begun" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: $python is missing or older than Python 3.10; set PYTHON to a newer one" >&2
            return 2
        fi
        echo "making $venv"
        mkdir -p "$(dirname "$venv")" && touch "$begun" && "$python" -m venv --clear "$venv" || {
            echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        }
        rm -f "$begun"
    else # uv makes virtual environments without pip
        { [ -e "$venv/pyvenv.cfg" ] && "$PY" -m ensurepip >/dev/null 2>&1; } || {
            echo "error: $venv is no virtual environment with a working pip, and nothing in it is removed for one;" \
                "move it away, or set VENV to another folder" >&2
            return 2
        }
    fi
    for file in "$@"; do
        # the stamp is the file's own content, written after pip has succeeded
        stamp="$venv/.fits-${file//\//-}"
        cmp -s "$root/$file" "$stamp" && continue
        # without an index it succeeds where all is there, as in an environment made by hand, and else changes nothing
        if ! "$PY" -m pip install -q --no-index -r "$root/$file" >/dev/null 2>&1; then
            echo "installing $file into $venv (minutes, the first time)"
            "$PY" -m pip install --disable-pip-version-check -r "$root/$file" || {
                echo "error: pip could not install $file; is there a network? a proxy or index: pip's own settings" >&2
                return 2
            }
        fi
        cp "$root/$file" "$stamp"
    done
}
