#!/usr/bin/env bash
# Runs the main job and all built test binaries as a plain user: user-mode userfaultfd, /dev/userfaultfd closed.
#
# They are copied first, to where nobody may go. What stays out is `compile_fail` and the tests called `cli`: they use cargo, run what
# was built, or write, in the build directory.
set -euo pipefail
cd "$(dirname "$0")/.."

device=/dev/userfaultfd
if [ "$(id -u)" -ne 0 ]; then
    as_nobody=()
else
    as_nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs)
fi

# The device is there and closed: a runtime that tries it first, and takes its refusal for the kernel's, fails here. Nothing is made to be
# so; where it is not, that is said.
if [ ! -e "$device" ]; then
    echo "ABSENT: there is no $device here, so this does not show that a closed one does no harm"
elif "${as_nobody[@]}" test -r "$device" -o -w "$device"; then
    echo "OPEN: this user may open $device, so this does not show what one may do who may not"
    [ "$(id -u)" -ne 0 ]
else
    echo "$device is there, and closed to this user"
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
chmod 755 "$dir"

# No test may pass by being skipped for want of a userfaultfd; what else is skipped is said at the end.
export SVM_REQUIRE="${SVM_REQUIRE-userfaultfd}" SVM_SKIPPED="$dir/skipped"
install -m 666 /dev/null "$SVM_SKIPPED"

run() {
    echo "\$ $*"
    (cd "$dir" && timeout --kill-after=10 180 "${as_nobody[@]}" "$@")
}

# Writes the executables that a cargo command builds to $dir/built, one a line: `target name<TAB>path`. $1 is a pattern for
# what cargo says of the profile.
list_built() {
    local profile=$1
    shift
    cargo "$@" --locked --message-format=json >"$dir/messages"
    sed -n 's/.*"reason":"compiler-artifact".*"target":{[^}]*"name":"\([^"]*\)".*"profile":{[^}]*'"$profile"'}.*"executable":"\([^"]*\)".*/\1\t\2/p' \
        "$dir/messages" >"$dir/built"
    [ -s "$dir/built" ]
}

copy() { install -m 755 "$1" "$dir/$2"; }

list_built '"test":false' build --release -p accel-sim --bin accel-sim
while IFS=$'\t' read -r name path; do
    copy "$path" "$name"
done <"$dir/built"
install -m 644 Cargo.lock "$dir/Cargo.lock"
run ./accel-sim doctor
run ./accel-sim run pagerank --input Cargo.lock

list_built '"test":true' test --workspace --no-run
count=0
while IFS=$'\t' read -r name path; do
    case "$name" in
        compile_fail | cli) continue ;;
    esac
    count=$((count + 1))
    copy "$path" "$count-$name"
    run "./$count-$name" --quiet </dev/null
done <"$dir/built"
echo "$count test binaries ran as a plain user; skipped, in part or whole: $(wc -l <"$SVM_SKIPPED")"
sort "$SVM_SKIPPED" | uniq -c
[ "$count" -ge 3 ]
