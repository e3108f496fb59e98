#!/usr/bin/env bash
# Shows that the loop of a slice kernel is the machine code of the plain loop: compiles both (benches/bin/span_loop.rs), and looks for the
# packed multiplication and addition of doubles in each. Prints the two inner loops; exits with 1 if either is scalar. x86-64.
#
#   benches/vectorised.sh [--quiet]
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
rm -f "$target"/release/deps/span_loop-*.s
cargo rustc -q --release --locked -p benches --bin span_loop -- --emit asm -C debuginfo=0
asm=$(ls -t "$target"/release/deps/span_loop-*.s | head -1)

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

status=0
for symbol in plain_loop SpanWork; do
    found=$(inner_loop "$symbol")
    if grep -qE '\sv?mulpd\s' <<<"$found" && grep -qE '\sv?addpd\s' <<<"$found"; then
        echo "$symbol: packed, $(grep -cE '\sv?mulpd\s' <<<"$found") multiplications and $(grep -cE '\sv?addpd\s' <<<"$found") additions a turn"
        [ "${1:-}" = --quiet ] || echo "$found"
    else
        echo "$symbol: no packed loop"
        status=1
    fi
done
exit $status
