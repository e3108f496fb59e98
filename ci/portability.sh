#!/usr/bin/env bash
# What is not x86-64 Linux: aarch64 Linux compiles; other systems compile, and every entry point is refused there.
#
# The second is tested on Linux, with the same system layer as elsewhere in place of the real one. Compiling for another
# target needs its standard library, which rustup brings; where it cannot, that part is skipped and said to be.
set -euo pipefail
cd "$(dirname "$0")/.."

RUSTFLAGS="${RUSTFLAGS:-} --cfg svm_unsupported" \
    cargo test --locked --target-dir "${CARGO_TARGET_DIR:-target}/unsupported" -p tests --test unsupported

for target in aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-gnu; do
    if ! rustup target list --installed 2>/dev/null | grep -qx "$target" &&
        ! timeout 60 rustup target add "$target" >/dev/null 2>&1; then
        echo "SKIPPED: no standard library for $target can be had here"
        continue
    fi
    cargo check --locked -p svm -p accel-sim --target "$target"
    echo "$target compiles"
done
