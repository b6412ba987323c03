#!/usr/bin/env bash
# How well do models of different spatial losses take to other text, through adapters of few ranks?
#
#     recipes/lora.sh TEXT RUN [RUN ...]          # e.g. mine.jsonl out/tau1 out/tau50 out/baseline
#
# Finetunes every RUN (or export, or USER/NAME) on TEXT (a file, a folder, pydoc) at every rank, into
# out/RUN-loraN (rank 0: out/RUN-full), and ends with a table. What is finished is not trained again, what was interrupted goes on.
# Models of one name from two folders need two OUT folders.
#
#     RANKS="2 4 8"     ranks of the adapters; 0 is full finetuning
#     OUT=out           where the new runs lie
#     FLAGS=""          further flags of finetune.py, such as "--max_steps 200 --keep_topography"
set -euo pipefail
trap 'exit 130' INT TERM # a run answers these by saving and ending well: start no other one then

if [ $# -lt 2 ]; then
    echo "error: usage: recipes/lora.sh TEXT RUN [RUN ...]" >&2
    exit 2
fi
text=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
out=${OUT:-out}
runs=()
for run in "$@"; do
    path=${run%/}
    name=$(basename "${path%/hf}")
    for rank in ${RANKS:-2 4 8}; do
        label=$name-lora$rank
        [ "$rank" != 0 ] || label=$name-full
        new=$out/$label
        resume=$([ -d "$new" ] && echo --resume || true)
        echo "== $new"
        # shellcheck disable=SC2086
        "$python" "$here/finetune.py" "$path" --data "$text" --lora_rank "$rank" \
            --run_name "$label" --out_dir "$out" $resume ${FLAGS:-}
        runs+=("$new")
    done
done
echo
PYTHONPATH=$here "$python" -m evals.finetuned "${runs[@]}"
