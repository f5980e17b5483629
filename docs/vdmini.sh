#!/bin/sh
# The table of docs/vdmini.md: sh docs/vdmini.sh FOLDER [MINUTES] [CLIPS] [LEARNT]. Run again, it goes on.
# MINUTES of training for each part of a student that lost blocks; CLIPS of each row; LEARNT: clips to learn from.
set -eu
folder=$1 minutes=${2:-15} clips=${3:-128} learnt=${4:-12000} model=${MODEL:-mini} data=${DATA:-mini}
mkdir -p "$folder"
cd "$folder"

# once STEP COMMAND...: what has ended well is not done again
once() {
    step=$1
    shift
    [ -e "$step.done" ] || { "$@" && touch "$step.done"; }
}

once importance cmdgen compress importance "$model" --data "$data" --clips 16 --steps 12 -o importance.json --plot importance.png
once prune-rule cmdgen compress prune "$model" -o rule --rule vdmini
once prune-measured cmdgen compress prune "$model" -o measured --rule measured --budget 0.7 --importance importance.json
once prune-mixed cmdgen compress prune "$model" -o mixed --rule vdmini --drop motion.blocks.0 --drop motion.blocks.4
# minutes of training are not to go into encoding
once copy-encoded cp -r rule encoded
once encoded cmdgen train content -o encoded --data "$data" --clips "$learnt" --teacher "$model" --steps 1
once decoder cmdgen train decoder -o tiny --data "$data" --clips "$learnt" --teacher "$model" --minutes "$minutes"
students=
for student in rule measured mixed; do
    students="$students $student"
    stages=
    if grep -q '"unet\.' "$student/model_index.json"; then stages=content; fi
    if grep -q '"motion\.' "$student/model_index.json"; then stages="$stages motion"; fi
    for losses in none icd mca both; do
        case $losses in
        none) weights="--icd 0 --mca 0" ;;
        icd) weights="--icd 0.1 --mca 0" ;;
        mca) weights="--icd 0 --mca 0.1" ;;
        both) weights="--icd 0.1 --mca 0.1" ;;
        esac
        once "copy-$student-$losses" cp -r "$student" "$student-$losses"
        once "cache-$student-$losses" sh -c "mkdir -p $student-$losses/training && cp -r encoded/training/cache $student-$losses/training"
        for stage in $stages; do
            once "$stage-$student-$losses" cmdgen train "$stage" -o "$student-$losses" --data "$data" --clips "$learnt" \
                --teacher "$model" --minutes "$minutes" --batch 8 --lr 5e-4 --warmup 20 $weights
        done
        students="$students $student-$losses"
    done
done
cmdgen compress compare "$model" $students --data "$data" --decoder tiny/decoder --clips "$clips" | tee table.md
