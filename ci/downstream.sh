#!/usr/bin/env bash
# Builds and runs a crate outside the workspace that depends on svm as the README says, and checks that it needs no libclang.
set -euo pipefail
cd "$(dirname "$0")/.."

manifest=tests/downstream/Cargo.toml
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/downstream"

# The README gives the git form of this crate's lines: the same keys.
for key in svm accel-sim userfaultfd-sys bytemuck; do
    for file in README.md "$manifest"; do
        grep -q "^$key = { " "$file" || { echo "$file does not name $key"; exit 1; }
    done
done
if grep -E '^name = "(bindgen|clang-sys)"' tests/downstream/Cargo.lock; then
    echo "the patch of userfaultfd-sys is not in effect"
    exit 1
fi
cargo run --locked --manifest-path "$manifest"
