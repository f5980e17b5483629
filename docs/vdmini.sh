#!/bin/sh
# The table of docs/vdmini.md: sh docs/vdmini.sh FOLDER [MINUTES] [CLIPS]. Run again, it goes on.
# MINUTES of training for each student and part, CLIPS of each row.
set -eu
folder=$1 minutes=${2:-30} clips=${3:-128} model=${MODEL:-mini} data=${DATA:-mini}
mkdir -p "$folder"
cd "$folder"

# once STEP COMMAND...: what has ended well is not done again
once() {
    step=$1
    shift
    [ -e "$step.done" ] || { "$@" && touch "$step.done"; }
}

once importance cmdgen compress importance "$model" --data "$data" -o importance.json --plot importance.png
once prune-rule cmdgen compress prune "$model" -o rule --rule vdmini
once prune-measured cmdgen compress prune "$model" -o measured --rule measured --budget 0.7 --importance importance.json
once decoder cmdgen train decoder -o tiny --data "$data" --teacher "$model" --minutes "$minutes"
students=
for student in rule measured; do
    students="$students $student"
    for losses in none icd mca both; do
        case $losses in
        none) weights="--icd 0 --mca 0" ;;
        icd) weights="--icd 0.1 --mca 0" ;;
        mca) weights="--icd 0 --mca 1" ;;
        both) weights="--icd 0.1 --mca 1" ;;
        esac
        once "copy-$student-$losses" cp -r "$student" "$student-$losses"
        for stage in content motion; do
            # the clips are encoded once, by the first of them
            [ -e cache ] && [ ! -e "$student-$losses/training" ] && mkdir "$student-$losses/training" && cp -r cache "$student-$losses/training/cache"
            once "$stage-$student-$losses" cmdgen train "$stage" -o "$student-$losses" --data "$data" --teacher "$model" \
                --minutes "$minutes" --lr 2e-4 --warmup 50 $weights
            [ -e cache ] || cp -r "$student-$losses/training/cache" cache
        done
        students="$students $student-$losses"
    done
done
cmdgen compress compare "$model" $students --data "$data" --decoder tiny/decoder --clips "$clips" | tee table.md
