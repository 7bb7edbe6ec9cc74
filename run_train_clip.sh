#!/usr/bin/env bash
# Train with one command:  bash run_train_clip.sh
# Edit the values below, or set them from outside:  DATA_DIR=my_images EPOCHS=50 bash run_train_clip.sh
# Further options are handed on to train_clip.py:   bash run_train_clip.sh --loss ce --no-amp

# ---- edit here -------------------------------------------------------------------------------------------------
DATA_DIR="${DATA_DIR:-}"                    # one sub-folder of images per class; empty: single_label_data, else a demo
OUTPUT_DIR="${OUTPUT_DIR:-}"                # empty: checkpoints/clip_models/my_model (the demo: .../demo)
IMAGE_ENCODER="${IMAGE_ENCODER:-starnet_dual_pyramid_rcf}"
TEXT_ENCODER="${TEXT_ENCODER:-}"            # empty: bert-base-chinese (the demo: bert-tiny-bytes, no download)
CLASS_TEXTS_FILE="${CLASS_TEXTS_FILE:-}"    # JSON made by generate_class_texts.py; empty: TEXT_TEMPLATE
TEXT_TEMPLATE="${TEXT_TEMPLATE:-}"          # such as 这是一张{class_name}的医学图像; empty: the class names themselves
GROUP_PATTERN="${GROUP_PATTERN:-}"          # regular expression on the file name whose first group is the patient
GROUPS_FILE="${GROUPS_FILE:-}"              # or a CSV with columns path,group
EPOCHS="${EPOCHS:-}"                        # empty: 100 (the demo: 36)
BATCH_SIZE="${BATCH_SIZE:-}"                # empty: 32 (the demo: 16)
LEARNING_RATE="${LEARNING_RATE:-}"          # empty: 1e-4
IMG_SIZE="${IMG_SIZE:-}"                    # empty: 224 (the demo: 96)
USE_CV="${USE_CV:-0}"                       # 1: k-fold cross-validation
N_SPLITS="${N_SPLITS:-5}"
CONFIG_FILE="${CONFIG_FILE:-}"              # JSON array: train every configuration of it instead of the encoders above
GPU_IDS="${GPU_IDS:-0}"                     # "0", or "0 1 2": with CONFIG_FILE one configuration at a time on each
# ----------------------------------------------------------------------------------------------------------------

set -euo pipefail
fail() { echo "error: $1" >&2; exit 2; }

case "$(tr '[:upper:]' '[:lower:]' <<<"$USE_CV")" in
    1 | true | yes | on) cv=1 ;;
    0 | false | no | off) cv=0 ;;
    *) fail "USE_CV must be 1, true, yes or on, or 0, false, no or off; not '$USE_CV'" ;;
esac
read -ra gpus <<<"$(tr -s ' ,' '\n' <<<"$GPU_IDS" | awk '/^[0-9]+$/ { $0 += 0 } NF && !seen[$0]++' | tr '\n' ' ')"
if [[ ! "${gpus[*]-}" =~ ^(-1|[0-9]+)(' '(-1|[0-9]+))*$ ]]; then
    fail "GPU_IDS must be the number of a GPU, several as \"0 1\", or -1 for the CPU; not '$GPU_IDS'"
elif [ "${#gpus[@]}" -gt 1 ] && [ -z "$CONFIG_FILE" ]; then
    fail "GPU_IDS names several GPUs; only the entries of a CONFIG_FILE run side by side. Give one GPU."
elif [ "${#gpus[@]}" -gt 1 ] && [[ " $*" =~ " --gpu-id"|" --config-index"|" --output-dir" ]]; then
    fail "with several GPU_IDS, leave --gpu-id and --config-index out, and set OUTPUT_DIR instead of --output-dir"
fi

# No cd: relative paths, also those in the options handed on, are meant from where the command is given.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common/venv.sh"
ensure_venv requirements.txt
# Python code, then its arguments; packages are this program's, not those of the folder where the command is given
of_program() { "$PY" -c "import sys; sys.path[0] = sys.argv.pop(1); $1" "$here" "${@:2}"; }

demo=0
if [ -z "$DATA_DIR" ]; then
    DATA_DIR=single_label_data
    if [ ! -d "$DATA_DIR" ]; then
        demo=1
        DATA_DIR=demo_data_synthetic
        echo "No DATA_DIR and no folder single_label_data in $PWD: training on a demo set of synthetic phantoms."
        of_program 'from data.demo import main; sys.exit(main())' --output "$DATA_DIR"
        OUTPUT_DIR="${OUTPUT_DIR:-checkpoints/clip_models/demo}"
        TEXT_ENCODER="${TEXT_ENCODER:-bert-tiny-bytes}"
        GROUP_PATTERN="${GROUP_PATTERN:-^(P\\d+)_}"
        TEXT_TEMPLATE="${TEXT_TEMPLATE:-这是一张{class_name\}的胸部X光图像}"
        EPOCHS="${EPOCHS:-36}" BATCH_SIZE="${BATCH_SIZE:-16}" IMG_SIZE="${IMG_SIZE:-96}"
    fi
fi
OUTPUT_DIR="${OUTPUT_DIR:-checkpoints/clip_models/my_model}"

options=(--data-dir "$DATA_DIR" --output-dir "$OUTPUT_DIR")
add() { if [ -n "$2" ]; then options+=("$1" "$2"); fi; }
add --class-texts-file "$CLASS_TEXTS_FILE"
add --text-template "$TEXT_TEMPLATE"
add --group-pattern "$GROUP_PATTERN"
add --groups-file "$GROUPS_FILE"
add --epochs "$EPOCHS"
add --batch-size "$BATCH_SIZE"
add --learning-rate "$LEARNING_RATE"
add --img-size "$IMG_SIZE"
if [ "$cv" = 1 ]; then options+=(--use-cv --n-splits "$N_SPLITS"); fi
# the same command again continues; a --resume-from among the options handed on comes later and wins
if [[ " $* " != *" --overwrite "* ]]; then options+=(--resume-from auto); fi

# Jobs run in the background, where bash answers a signal at once: whoever ends this script ends its trainings.
stop() {
    trap - INT TERM HUP
    kill $(jobs -p) 2>/dev/null || true
    wait
    exit "$1"
}
stopped="stopped; what was trained is saved, and the same command (without --overwrite) goes on from there"
trap 'echo "$stopped" >&2; stop 130' INT
trap 'echo "$stopped" >&2; stop 143' TERM
trap 'stop 129' HUP

if [ -z "$CONFIG_FILE" ]; then
    options+=(--image-encoder "$IMAGE_ENCODER")
    add --text-encoder "$TEXT_ENCODER"
else
    options+=(--multi-config --config-file "$CONFIG_FILE")
    add --text-encoder "$TEXT_ENCODER" # only where it is set: it then wins over every entry of the file
fi

if [ "${#gpus[@]}" -eq 1 ]; then
    "$PY" "$here/train_clip.py" "${options[@]}" --gpu-id "${gpus[0]}" "$@" &
    wait $!
else
    # What concerns all configurations: "count" checks them and the GPUs and prints their number, "rank" writes the
    # leaderboard. The first GPU stands for that of any job, which wins over an entry's own.
    configurations() {
        of_program '
import contextlib, pathlib
from functools import partial
from common.cli import exit_code_of
from common.device import gpu_meant
from common.errors import all_of
from common.files import check_writable
from training.leaderboard import print_leaderboard, write_leaderboard
from training.multi_config import read_entries
from training.options import make_config, options_from_flags, resolve_auto

def main():
    what, gpus, *flags = sys.argv[1:]
    typed = resolve_auto(options_from_flags([*flags, "--gpu-id", gpus.split()[0]]))
    config = make_config(typed)
    output_dir = pathlib.Path(config.output_dir)
    check_writable(output_dir)
    all_of(*(partial(gpu_meant, int(gpu)) for gpu in gpus.split()))
    counting = what == "count"
    with contextlib.redirect_stdout(sys.stderr if counting else None):  # notes, once
        entries = read_entries(config, typed)
    if counting:
        print(len(entries))
    else:
        print_leaderboard(write_leaderboard(output_dir, entries), output_dir)
    return 0

sys.exit(exit_code_of(main, "nothing was started"))' "$@"
    }

    # One worker per GPU; each takes the next configuration that no other has claimed (mkdir succeeds once).
    worker() {
        local gpu="$1" status=0 i
        shift
        trap 'stop 143' TERM
        for ((i = 1; i <= entries; i++)); do
            mkdir "$claims/$i" 2>/dev/null || continue
            echo "configuration $i of $entries on GPU $gpu, log: $OUTPUT_DIR/logs/entry_$i.log"
            "$PY" "$here/train_clip.py" "${options[@]}" --config-index "$i" --gpu-id "$gpu" "$@" \
                >"$OUTPUT_DIR/logs/entry_$i.log" 2>&1 &
            wait $! || { status=1; echo "configuration $i failed; see its log"; }
        done
        return "$status"
    }

    entries="$(configurations count "${gpus[*]}" "${options[@]}" "$@")"
    mkdir -p "$OUTPUT_DIR/logs"
    claims="$(mktemp -d)"
    trap 'rm -rf "$claims"' EXIT
    pids=() status=0
    for gpu in "${gpus[@]}"; do worker "$gpu" "$@" & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    # once more at the end: the job that wrote it last may have read the folders before another had finished
    configurations rank "${gpus[*]}" "${options[@]}" "$@" || status=1
    if [ "$status" != 0 ]; then exit "$status"; fi
fi

if [ "$demo" = 1 ]; then
    cat <<END

That was the demo: synthetic phantoms, not patients. For your own images, one sub-folder per class:

    DATA_DIR=path/to/your/folder bash run_train_clip.sh

and, where patients have several images, GROUP_PATTERN='^(P\\d+)_' (or GROUPS_FILE=patients.csv) so that no patient
is on both sides of the split. bert-base-chinese is downloaded once; TEXT_ENCODER=bert-tiny-bytes needs no download.
END
fi
