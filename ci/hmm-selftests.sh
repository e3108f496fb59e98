#!/usr/bin/env bash
# The kernel's own HMM selftests, built unmodified from Debian's kernel sources and run on svm in place of its test module.
#
#   bash ci/hmm-selftests.sh            both doors
#   bash ci/hmm-selftests.sh TEST…      these tests alone, e.g. hmm.hmm_device_private.migrate
#
# A stand-in for /dev/hmm_dmirror* is loaded with LD_PRELOAD; see tests/dmirror. Nothing of the kernel is kept in this repository:
# the package is downloaded (150 MB) to a cache and seven files of it are unpacked.
#
# Expected not to pass, and why:
#   *_device_coherent.*    skipped: no such device node here, see below
#   hmm_gup_test           skipped: needs the kernel's own debugfs file
#   migrate_file_private   fails: userfaultfd can neither register nor move private file mappings; they are served in place, and
#                          an explicit migration is refused with ENOENT rather than pretended
# All others pass: fewer than that is a failure of this script.
#
# What the coherent variants would take. Coherent device memory is reached by the CPU where it is: a page that migrates there stays in the
# CPU's page table, and no fault brings it home. Here a page is with whoever has it in its page table (block.rs, D1), and a window is apart
# from the host's addresses: so it would need a third state in the directory, "a device's frame at the host's address", served like a
# pinned page (in place, translations taken by brackets) but counted, evicted and shown by snapshots as that device's. And it would
# need frames that are a device's: a memory node without CPUs (CXL, or numa=fake), to which move_pages(2) migrates in place. On one
# node, as here, such a migration would move nothing: the tests would pass by bookkeeping alone, which is not worth having.
set -euo pipefail
cd "$(dirname "$0")/.."

package=linux-source-6.12
tree=$package
cache=${SVM_HMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/svm-hmm-selftests}
allowed='migrate_file_private'
# Of the 29 tests on private memory, with huge pages reserved.
expected=27
pool=/proc/sys/vm/nr_hugepages

fetch() {
    mkdir -p "$cache"
    (
        cd "$cache"
        ls "$package"_*.deb >/dev/null 2>&1 || { apt-get update -q && apt-get download "$package"; }
        dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x --wildcards "./usr/src/$tree.tar.*"
        tar -xf usr/src/"$tree".tar.* "$tree/tools/testing/selftests/mm/hmm-tests.c" "$tree/tools/testing/selftests/kselftest.h" \
            "$tree/tools/testing/selftests/kselftest_harness.h" "$tree/lib/test_hmm_uapi.h" "$tree/mm/gup_test.h"
        rm -rf usr
    )
}

source_dir=$cache/$tree/tools/testing/selftests/mm
[ -e "$source_dir/hmm-tests.c" ] || fetch
(cd "$source_dir" && gcc -O1 -D_GNU_SOURCE -I. -I.. -I../../../.. hmm-tests.c -o "$cache/hmm-tests" -lpthread -lrt)
cargo build --release --locked -p svm-dmirror
library=${CARGO_TARGET_DIR:-target}/release/libsvm_dmirror.so

if [ "$(cat $pool)" -lt 4 ] && ! { echo 4 >$pool; } 2>/dev/null; then
    echo "no huge pages are reserved, and none can be reserved here: two tests on them will be skipped"
    expected=25
fi

status=0
for delivery in inline thread; do
    for granule in page big huge; do
        log=$cache/$delivery-$granule.tap
        echo "==> $delivery door, granule $granule"
        tests=()
        for test in "$@"; do tests+=(-t "${test##*.}"); done
        SVM_DMIRROR_DELIVERY=$delivery SVM_DMIRROR_GRANULE=$granule LD_PRELOAD=$library \
            timeout --kill-after=10 300 "$cache/hmm-tests" "${tests[@]}" >"$log" 2>&1 || true
        grep -E '^(not ok|ok .*# SKIP)' "$log" | sed 's/^/    /' || true
        grep -E '^# Totals' "$log" || { echo "no totals: it did not get to its end"; tail -5 "$log"; status=1; }
        if grep -E '^not ok' "$log" | grep -Eqv "$allowed"; then status=1; fi
        passed=$(sed -n 's/^# Totals: pass:\([0-9]*\) .*/\1/p' "$log")
        if [ $# -eq 0 ] && [ "${passed:-0}" -lt $expected ]; then
            echo "${passed:-0} passed, which is fewer than the $expected that are expected to"
            status=1
        fi
    done
done
exit $status
