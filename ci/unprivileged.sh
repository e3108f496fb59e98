#!/usr/bin/env bash
# Runs the main job and all built test binaries as a plain user: user-mode userfaultfd, /dev/userfaultfd closed.
#
# They are copied first, to where nobody may go. Two test binaries stay out: `compile_fail` and `cli` use cargo, or write, in
# the build directory.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
    as_nobody=()
else
    as_nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs)
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
chmod 755 "$dir"

run() {
    echo "\$ $*"
    (cd "$dir" && timeout --kill-after=10 180 "${as_nobody[@]}" "$@")
}

# The executables that a cargo command builds, one a line: `target name<TAB>path`.
built() {
    cargo "$@" --locked --message-format=json |
        sed -n 's/.*"reason":"compiler-artifact".*"target":{[^}]*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1\t\2/p'
}

copy() { install -m 755 "$1" "$dir/$2"; }

while IFS=$'\t' read -r name path; do
    copy "$path" "$name"
done < <(built build --release -p accel-sim --bin accel-sim)
install -m 644 Cargo.lock "$dir/Cargo.lock"
run ./accel-sim doctor
run ./accel-sim run pagerank --input Cargo.lock

count=0
while IFS=$'\t' read -r name path; do
    case "$name" in
        compile_fail | cli) continue ;;
    esac
    copy "$path" "test-$name"
    run "./test-$name" --quiet
    count=$((count + 1))
done < <(built test --workspace --no-run)
echo "$count test binaries ran as a plain user"
[ "$count" -ge 3 ]
