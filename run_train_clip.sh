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
# Relative paths are meant from where the command is given.
for name in DATA_DIR OUTPUT_DIR CLASS_TEXTS_FILE GROUPS_FILE CONFIG_FILE; do
    case "${!name}" in "" | /*) ;; *) printf -v "$name" '%s' "$PWD/${!name}" ;; esac
done
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here"
source common/venv.sh
ensure_venv requirements.txt

demo=0
if [ -z "$DATA_DIR" ]; then
    DATA_DIR=single_label_data
    if [ ! -d "$DATA_DIR" ]; then
        demo=1
        DATA_DIR=demo_data_synthetic
        echo "No folder single_label_data and no DATA_DIR: training on a demo set of synthetic phantoms."
        "$PY" -m data.demo --output "$DATA_DIR"
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
if [ "$USE_CV" = 1 ]; then options+=(--use-cv --n-splits "$N_SPLITS"); fi

read -ra gpus <<<"$(tr -s ' ,' '\n' <<<"$GPU_IDS" | awk 'NF && !seen[$0]++' | tr '\n' ' ')"

if [ -z "$CONFIG_FILE" ]; then
    if [ "${#gpus[@]}" -gt 1 ]; then
        echo "error: GPU_IDS names several GPUs; only the entries of a CONFIG_FILE run side by side. Give one GPU." >&2
        exit 2
    fi
    options+=(--image-encoder "$IMAGE_ENCODER")
    add --text-encoder "$TEXT_ENCODER"
    # the same command again continues: a single run from its last checkpoint, a cross-validation by itself
    if [ "$USE_CV" != 1 ] && [ -f "$OUTPUT_DIR/checkpoint_latest.pth" ] \
        && [[ ! " $* " =~ " --overwrite "|" --output-dir"|" --use-cv "|" --resume-from" ]]; then
        options+=(--resume-from "$OUTPUT_DIR/checkpoint_latest.pth")
    fi
    "$PY" train_clip.py "${options[@]}" --gpu-id "${gpus[0]}" "$@"
else
    options+=(--multi-config --config-file "$CONFIG_FILE")
    add --text-encoder "$TEXT_ENCODER" # only where it is set: it then wins over every entry of the file
    if [ "${#gpus[@]}" -eq 1 ]; then
        "$PY" train_clip.py "${options[@]}" --gpu-id "${gpus[0]}" "$@"
    else
        # One worker per GPU; each takes the next configuration that no other has claimed (mkdir succeeds once).
        entries="$("$PY" -c 'import json, sys; print(len(json.load(open(sys.argv[1], encoding="utf-8-sig"))))' "$CONFIG_FILE")"
        mkdir -p "$OUTPUT_DIR/logs"
        claims="$(mktemp -d)"
        trap 'rm -rf "$claims"; kill $(jobs -p) 2>/dev/null || true' EXIT
        worker() {
            local gpu="$1" status=0 i
            shift
            for ((i = 1; i <= entries; i++)); do
                mkdir "$claims/$i" 2>/dev/null || continue
                echo "configuration $i of $entries on GPU $gpu, log: $OUTPUT_DIR/logs/entry_$i.log"
                "$PY" train_clip.py "${options[@]}" --config-index "$i" --gpu-id "$gpu" "$@" \
                    >"$OUTPUT_DIR/logs/entry_$i.log" 2>&1 || { status=1; echo "configuration $i failed; see its log"; }
            done
            return "$status"
        }
        pids=()
        for gpu in "${gpus[@]}"; do worker "$gpu" "$@" & pids+=($!); done
        status=0
        for pid in "${pids[@]}"; do wait "$pid" || status=1; done
        echo "leaderboard: $OUTPUT_DIR/leaderboard.csv"
        exit "$status"
    fi
fi

if [ "$demo" = 1 ]; then
    cat <<END

That was the demo: synthetic phantoms, not patients. For your own images, one sub-folder per class:

    DATA_DIR=path/to/your/folder bash run_train_clip.sh

and, where patients have several images, GROUP_PATTERN='^(P\\d+)_' (or GROUPS_FILE=patients.csv) so that no patient
is on both sides of the split. bert-base-chinese is downloaded once; TEXT_ENCODER=bert-tiny-bytes needs no download.
END
fi
