# Sourced by run_train_clip.sh and tests/run.sh: a virtual environment that fits the requirements files given.
# VENV: where it lies (default .venv). PYTHON: what makes it (default python3, 3.10 or newer).
# Afterwards $PY is its interpreter.

ensure_venv() {
    local venv="${VENV:-.venv}" python="${PYTHON:-python3}" file stamp
    PY="$venv/bin/python"
    if ! "$PY" -c 'import pip' 2>/dev/null; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: $python is missing or older than Python 3.10; set PYTHON to a newer one" >&2
            return 2
        fi
        echo "making $venv"
        "$python" -m venv --clear "$venv" || {
            echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        }
    fi
    for file in "$@"; do
        # the stamp is the file's own content, written after pip has succeeded
        stamp="$venv/.fits-${file//\//-}"
        cmp -s "$file" "$stamp" && continue
        echo "installing $file into $venv (minutes, the first time)"
        "$PY" -m pip install --disable-pip-version-check -r "$file" || {
            echo "error: pip could not install $file; is there a network? a proxy or index: pip's own settings" >&2
            return 2
        }
        cp "$file" "$stamp"
    done
}
