//! What a plain user has: user-mode userfaultfd, and a /dev/userfaultfd that exists but is closed to it.
//!
//! Run by root, each test runs once more as nobody, in a process of its own: a copy of this binary, for nobody may not enter
//! the directories that it was built in. Run by anybody else it runs here.

#![cfg(target_os = "linux")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use accel_sim::{Accelerator, Error};
use svm::{Capabilities, Capability, Delivery, Granule, Options, mirror_with};
use tests::Watchdog;

const NOBODY: u32 = 65534;
const DEADLINE: Duration = Duration::from_secs(60);

/// A copy of this binary that anybody may execute, in a directory of its own; gone when dropped.
struct Binary(PathBuf);

impl Binary {
    fn new(test: &str) -> io::Result<Self> {
        let dir = env::temp_dir().join(format!("svm-unprivileged-{}-{test}", std::process::id()));
        fs::create_dir(&dir)?;
        let copy = Self(dir);
        fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o755))?;
        fs::copy(env::current_exe()?, copy.path())?;
        fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755))?;
        Ok(copy)
    }

    fn path(&self) -> PathBuf {
        self.0.join("test")
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn is_root() -> bool {
    // SAFETY: it has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Runs `body` as a plain user: here if that is what we are, else in another process, where `test` comes here again.
fn as_plain_user(test: &'static str, body: fn()) {
    if !is_root() {
        let _watchdog = Watchdog::new(test);
        if tests::usable() {
            body();
        }
        return;
    }
    // One at a time: a process forked while a copy is written would hold it open for writing, and then nobody can run it.
    static SPAWNING: Mutex<()> = Mutex::new(());
    let spawning = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    let copy = Binary::new(test).expect("a copy of this binary");
    let mut child = Command::new(copy.path())
        .args(["--exact", test, "--nocapture"])
        .current_dir("/")
        // Dropping root as std does it also drops the supplementary groups.
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nobody can run the copy");
    drop(spawning);
    let start = Instant::now();
    while child.try_wait().expect("it can be waited for").is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().expect("it can be killed");
            child.wait().expect("it can be waited for");
            panic!("{test} as nobody: no end within {DEADLINE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("its output");
    let said = String::from_utf8_lossy(&output.stdout);
    // Success alone could mean that no test has this name.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{test} as nobody: {}\n{said}",
        output.status
    );
}

#[test]
fn the_accelerator_works() {
    as_plain_user("the_accelerator_works", || {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            for delivery in [Delivery::Inline, Delivery::Thread] {
                let options = Options::new().granule(granule).delivery(delivery);
                let accel = Accelerator::new().expect("an accelerator");
                let mut data = vec![1_u64; 1 << 19];
                let mut mirror = mirror_with(&mut data, &options).expect("a mirror");
                for round in 1..4 {
                    let add = |chunk: &mut [u64]| chunk.iter_mut().for_each(|e| *e += 1);
                    accel.run(mirror.view_mut(), add).expect("a launch");
                    let wrong = mirror.as_slice().iter().position(|&e| e != round + 1);
                    assert_eq!(wrong, None, "{options:?}");
                    mirror.as_mut_slice()[0] = round + 1;
                }
                let stats = mirror.stats();
                assert!(
                    stats.to_device_pages() > 0 && stats.to_host_pages() > 0,
                    "{stats:?}"
                );
                assert_eq!(stats.anomalies, 0, "{stats:?}");
                mirror.close().expect("all pages come home");
            }
        }
    });
}

#[test]
fn capabilities_say_what_a_plain_user_lacks() {
    as_plain_user("capabilities_say_what_a_plain_user_lacks", || {
        let capabilities = Capabilities::probe();
        assert!(capabilities.is_usable(), "{capabilities}");
        let open = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
            .is_ok_and(|setting| setting.trim() == "1");
        let device = fs::File::open("/dev/userfaultfd").is_ok();
        assert_eq!(
            capabilities.has(Capability::KernelFaults),
            open || device,
            "{capabilities}"
        );
    });
}

#[test]
fn transparency_is_had_or_refused() {
    as_plain_user("transparency_is_had_or_refused", || {
        let has = Capabilities::probe().has(Capability::KernelFaults);
        let mut data = vec![0_u64; 1 << 14];
        match mirror_with(&mut data, &Options::new().transparent_syscalls(true)) {
            Ok(_) => assert!(has, "a promise that cannot be kept"),
            Err(error) => {
                assert!(!has && error.is_unsupported(), "{error}");
                let text = Error::from(error).to_string();
                assert!(
                    text.contains("doctor") || text.contains("userfaultfd"),
                    "{text}"
                );
            }
        }
    });
}
