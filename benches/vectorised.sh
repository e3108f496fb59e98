#!/usr/bin/env bash
# What the machine code of a hit is: compiles benches/bin/span_loop.rs, reads the assembly, and exits with 1 unless
#
#   - the packed inner loop of a slice kernel is the plain loop's: as many instructions, the same ones, with the same kinds of operands
#     (which registers, which displacements and how an address is scaled may differ), in the same order. A compiler that orders the two
#     loops differently does not fail this, but it is said;
#   - an element kernel's load and store, where the translation is cached, make no call and have no locked instruction and no fence.
#
# What is claimed of slices is that loop alone. Before it, once a chunk and not once an element, the slice kernel's code compares addresses,
# since the compiler cannot know that the chunks do not overlap; the plain function knows it from its arguments. The rest of a chunk that
# does not fill a turn, scalar in both, is not compared. x86-64.
#
#   benches/vectorised.sh [--quiet] [--listing FILE]    prints the code as well, unless quiet; writes it to FILE too
set -euo pipefail

quiet= listing=
while [ $# -gt 0 ]; do
    case $1 in
    --quiet) quiet=yes ;;
    --listing)
        case ${2:?--listing needs a file} in /*) listing=$2 ;; *) listing=$PWD/$2 ;; esac
        shift
        ;;
    *) echo "$0: what is $1?" >&2 && exit 2 ;;
    esac
    shift
done
cd "$(dirname "$0")/.."

asm=${CARGO_TARGET_DIR:-target}/span_loop.s
compile() { cargo rustc -q --release --locked -p benches --bin span_loop -- --emit "asm=$asm" -C debuginfo=0; }
rm -f "$asm"
compile
# What cargo finds built already it does not compile again, and nothing is written then.
[ -e "$asm" ] || { touch benches/bin/span_loop.rs && compile; }

# The inner loop: from the last label before the packed multiplication to the jump back to it. $1: what the function's symbol contains.
inner_loop() {
    awk -v symbol="$1" '
        /^[_a-zA-Z0-9.$]+:/ && !/^\.L/ { inside = index($0, symbol) > 0; body = "" }
        inside && /^\.LBB[0-9_]+:/ { label = substr($1, 1, length($1) - 1); body = ""; packed = 0 }
        inside && /^\t[a-z]/ {
            body = body $0 "\n"
            if ($1 ~ /^v?mulpd$/) packed = 1
            if (packed && $1 ~ /^j/ && $2 == label) { printf "%s", body; exit }
        }' "$asm"
}

# A function from its beginning to its first return: the way of a hit, on which no jump is taken.
hit_path() {
    awk -v symbol="$1" '
        /^[_a-zA-Z0-9.$]+:/ && !/^\.L/ { inside = index($0, symbol) > 0 }
        inside && /^\t[a-z]/ { print; if ($1 ~ /^ret/) exit }' "$asm"
}

# Instructions as mnemonic and kinds of operands.
kinds() {
    sed -E -e 's/[-+.$_A-Za-z0-9]*\([^)]*\)/mem/g' -e 's/%([xyz]mm)[0-9]+/\1/g' -e 's/\$[^,]+/imm/g' \
        -e 's/%[a-z0-9]+/reg/g' -e 's/\.LBB[0-9_]+/label/g'
}

count() { grep -c . <<<"$1" || true; }

status=0
# $1: what it is; $2: its code.
show() {
    local text
    text=$(printf '%s:\n%s\n' "$1" "$2")
    [ -n "$quiet" ] || echo "$text"
    [ -z "$listing" ] || printf '%s\n\n' "$text" >>"$listing"
}
say() {
    echo "$1"
    [ -z "$listing" ] || printf '%s\n' "$1" >>"$listing"
}
fail() {
    quiet=
    status=1
    say "$1"
}

compare_loops() {
    local slice plain slice_kinds plain_kinds
    slice=$(inner_loop SpanWork) plain=$(inner_loop plain_loop)
    slice_kinds=$(kinds <<<"$slice") plain_kinds=$(kinds <<<"$plain")
    if [ -z "$slice" ] || [ -z "$plain" ]; then
        fail "loops: one is not packed"
    elif [ "$slice_kinds" = "$plain_kinds" ]; then
        say "loops: the slice kernel's is the plain one's, $(count "$slice") instructions a turn, the same in the same order"
    elif [ "$(sort <<<"$slice_kinds")" = "$(sort <<<"$plain_kinds")" ]; then
        say "loops: the slice kernel's is the plain one's, $(count "$slice") instructions a turn, the same in another order"
    else
        fail "loops: the slice kernel's has $(count "$slice") instructions a turn, the plain one $(count "$plain"), and not the same"
    fi
    show "slice kernel, the packed loop" "$slice"
    show "plain loop" "$plain"
}

# $1: the function; $2: what it is.
check_hit() {
    local code
    code=$(hit_path "$1")
    if ! grep -q 'ret' <<<"$code"; then
        fail "$2: not found"
    elif grep -qE '^\s*(call|lock|[lms]fence|jmp)' <<<"$code"; then
        fail "$2: a call, a locked instruction, a fence or a detour on the way of a hit"
    else
        say "$2: $(count "$code") instructions from call to return where it hits; no call, no locked instruction, no fence"
    fi
    show "$2, a hit" "$code"
}

[ -z "$listing" ] || printf '%s, %s\n\n' "$(rustc --version)" "$(uname -m)" >"$listing"
compare_loops
check_hit load_element "load"
check_hit store_element "store"
exit $status
