//! The handler, in processes of its own: there is one per process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering::SeqCst};

use super::super::mmap::Reservation;
use super::super::testing::{alternate_stack_used, current_alternate_stack, in_child, test_name};
use super::super::uffd::{FaultScope, Features, Mode, Protect, Stop, Uffd, Wake};
use super::*;
use crate::addr::{PAGE_SIZE, PageRange, page_floor};

/// What the resolvers below work on; set once by the test.
struct Fixture {
    uffd: Uffd,
    memory: Reservation,
    source: Reservation,
}

static FIXTURE: OnceLock<Fixture> = OnceLock::new();
static FAULTS: AtomicU32 = AtomicU32::new(0);
static LAST_ACCESS: AtomicI32 = AtomicI32::new(-1);

impl Fixture {
    /// Eight pages, missing and registered for SIGBUS; and a page full of 7.
    fn set_up() -> &'static Self {
        let like = PageRange::from_pages(0x20_0000, 8).unwrap();
        let wanted = Features::SIGBUS | Features::PAGEFAULT_FLAG_WP | Features::POISON;
        let fixture = Self {
            uffd: Uffd::open(FaultScope::UserMode, wanted).unwrap(),
            memory: Reservation::congruent_to(like).unwrap(),
            source: Reservation::congruent_to(like).unwrap(),
        };
        assert!(fixture.uffd.enabled().contains(Features::SIGBUS));
        // SAFETY: a page of the test's own.
        unsafe { fixture.source.as_ptr().write_bytes(7, PAGE_SIZE) };
        // SAFETY: the memory is the test's own; only raw pointers lead there.
        unsafe {
            fixture
                .uffd
                .register(fixture.memory.range(), Mode::MISSING | Mode::WP)
        }
        .unwrap();
        FIXTURE.get_or_init(|| fixture)
    }

    fn page(&self, page: usize) -> PageRange {
        PageRange::from_pages(self.memory.range().start() + page * PAGE_SIZE, 1).unwrap()
    }

    fn byte(&self, page: usize) -> *mut u8 {
        self.memory.as_ptr().wrapping_add(page * PAGE_SIZE + 123)
    }

    fn load(&self, page: usize) -> u8 {
        // SAFETY: in bounds; the resolver makes it present.
        unsafe { self.byte(page).read_volatile() }
    }

    fn store(&self, page: usize, value: u8) {
        // SAFETY: in bounds; the resolver makes it present and writable.
        unsafe { self.byte(page).write_volatile(value) };
    }
}

/// COPY for a missing page, un-protect for a protected one, as the runtime's resolver does.
fn resolve(fault: &BusFault) -> Verdict {
    let Some(fixture) = FIXTURE.get() else {
        return Verdict::NotOurs;
    };
    if !fixture.memory.range().contains_addr(fault.addr) {
        return Verdict::NotOurs;
    }
    FAULTS.fetch_add(1, SeqCst);
    LAST_ACCESS.store(fault.access as i32, SeqCst);
    assert!(async_signals_blocked());
    set_errno(libc::EXDEV);
    let Some(page) = PageRange::from_pages(page_floor(fault.addr), 1) else {
        return Verdict::NotOurs;
    };
    let source = fixture.source.range().start();
    // SAFETY: the page is registered with this descriptor.
    let copied = unsafe { fixture.uffd.copy(page, source, Protect::No, Wake::No) };
    match copied.stop {
        Stop::Complete => Verdict::Resolved,
        Stop::Exists if fixture.uffd.write_unprotect(page, Wake::No) == Stop::Complete => {
            Verdict::Resolved
        }
        _ => Verdict::NotOurs,
    }
}

/// Installs a handler for SIGBUS, as an app would have before the runtime.
fn install_app_handler(handler: libc::sighandler_t, flags: libc::c_int, mask: libc::sigset_t) {
    let mut action = zeroed_action();
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action.sa_mask = mask;
    // SAFETY: the action is initialised and its handler a function (or SIG_IGN).
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

#[test]
fn a_thread_resolves_its_own_faults() {
    let body = || {
        let fixture = Fixture::set_up();
        install(resolve).unwrap();
        install(resolve).unwrap();
        assert!(is_installed());
        assert!(!async_signals_blocked());
        set_errno(libc::ENOTTY);
        let expect = |nr_faults, access: Access| {
            assert_eq!(FAULTS.load(SeqCst), nr_faults);
            let seen = LAST_ACCESS.load(SeqCst);
            if cfg!(target_arch = "x86_64") {
                assert_eq!(seen, access as i32);
            }
        };
        assert_eq!(fixture.load(0), 7);
        assert_eq!(errno(), libc::ENOTTY);
        expect(1, Access::ReadMissing);
        fixture.store(1, 9);
        expect(2, Access::WriteMissing);
        assert_eq!(fixture.load(1), 9);
        assert_eq!(fixture.uffd.write_protect(fixture.page(1)), Stop::Complete);
        assert_eq!(fixture.load(1), 9);
        expect(2, Access::WriteMissing);
        fixture.store(1, 10);
        expect(3, Access::WriteProtected);
        assert_eq!(fixture.load(1), 10);
        assert!(!async_signals_blocked());
        // On other threads too, the slots of the table being free again after each.
        std::thread::scope(|scope| {
            for page in 2..8 {
                scope.spawn(move || assert_eq!(fixture.load(page), 7));
            }
        });
        expect(9, Access::ReadMissing);
    };
    let name = test_name!("a_thread_resolves_its_own_faults");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn the_handler_fits_the_stack_that_std_gives_a_thread() {
    let body = || {
        let fixture = Fixture::set_up();
        install(resolve).unwrap();
        let used = alternate_stack_used(|| assert_eq!(fixture.load(0), 7));
        // SAFETY: no preconditions.
        let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        // Half of the 8 KiB, beside the kernel's frame, is left to the resolver proper.
        assert!(
            used > 0 && used < frame + 4096,
            "{used} bytes, frame {frame}"
        );
        super::super::process::write_stderr(format!("used {used} of {frame} + 4096\n").as_bytes());
    };
    let name = test_name!("the_handler_fits_the_stack_that_std_gives_a_thread");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn a_second_resolver_is_refused() {
    fn other(_: &BusFault) -> Verdict {
        Verdict::Resolved
    }
    let body = || {
        install(resolve).unwrap();
        let error = install(other).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    };
    let name = test_name!("a_second_resolver_is_refused");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn a_fault_inside_the_resolver_aborts_with_a_message() {
    fn touches_what_is_missing(fault: &BusFault) -> Verdict {
        if let Some(fixture) = FIXTURE.get() {
            fixture.load(5);
        }
        resolve(fault)
    }
    let body = || {
        let fixture = Fixture::set_up();
        install(touches_what_is_missing).unwrap();
        fixture.load(0);
    };
    let name = test_name!("a_fault_inside_the_resolver_aborts_with_a_message");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_killed_by(libc::SIGABRT);
        let wanted = "inside the page-fault resolver";
        assert!(ended.stderr.contains(wanted), "{}", ended.stderr);
    }
}

/// A page whose file is shorter than its mapping: any access is SIGBUS, and not ours.
fn beyond_the_file() -> *mut u8 {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"svm-test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: a new mapping of an empty file; the descriptor may leak, the process is the test's.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert_ne!(address, libc::MAP_FAILED);
    address.cast()
}

fn access(address: *mut u8) -> u8 {
    // SAFETY: the page is mapped; the access raises SIGBUS, which is what the test wants.
    unsafe { address.read_volatile() }
}

#[test]
fn without_a_previous_handler_a_stray_fault_kills() {
    let body = || {
        install_app_handler(libc::SIG_DFL, 0, empty_set());
        install(resolve).unwrap();
        access(beyond_the_file());
    };
    let name = test_name!("without_a_previous_handler_a_stray_fault_kills");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_killed_by(libc::SIGBUS);
    }
}

#[test]
fn a_sent_signal_meets_the_default_too() {
    let body = || {
        install_app_handler(libc::SIG_DFL, 0, empty_set());
        install(resolve).unwrap();
        // SAFETY: no preconditions.
        unsafe { libc::raise(libc::SIGBUS) };
    };
    let name = test_name!("a_sent_signal_meets_the_default_too");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_killed_by(libc::SIGBUS);
    }
}

#[test]
fn an_ignored_signal_is_ignored_when_sent_and_kills_when_raised() {
    let body = || {
        install_app_handler(libc::SIG_IGN, 0, empty_set());
        install(resolve).unwrap();
        // SAFETY: no preconditions.
        unsafe { libc::raise(libc::SIGBUS) };
        super::super::process::write_stderr(b"still here\n");
        access(beyond_the_file());
    };
    let name = test_name!("an_ignored_signal_is_ignored_when_sent_and_kills_when_raised");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_killed_by(libc::SIGBUS);
        assert!(ended.stderr.contains("still here"), "{}", ended.stderr);
    }
}

static CHAINED_TO: AtomicU32 = AtomicU32::new(0);
static CHAINED_ON_ALTERNATE: AtomicBool = AtomicBool::new(false);
static CHAINED_ADDR: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Repairs the page by mapping another over it, as apps with file mappings do.
extern "C" fn app_handler(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    assert_eq!(signal, libc::SIGBUS);
    // SAFETY: the kernel's siginfo, passed on.
    let info = unsafe { &*info };
    // SAFETY: for SIGBUS it has an address.
    let addr = unsafe { info.si_addr() };
    CHAINED_ADDR.store(addr, SeqCst);
    CHAINED_TO.fetch_add(1, SeqCst);
    let mut mask = empty_set();
    // SAFETY: reads the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) };
    // SAFETY: the set is initialised.
    let has = |signal| unsafe { libc::sigismember(&raw const mask, signal) } == 1;
    // The mask it asked for, and no more.
    assert!(has(libc::SIGUSR1) && !has(libc::SIGUSR2));
    assert!(!has(libc::SIGBUS), "it asked for SA_NODEFER");
    // It is where the kernel would have run it, or has as much room there.
    let here = 0_u8;
    let alternate = current_alternate_stack();
    let used = (&raw const here)
        .addr()
        .wrapping_sub(alternate.ss_sp.addr());
    CHAINED_ON_ALTERNATE.store(used < alternate.ss_size, SeqCst);
    // A chained handler may touch mirrored memory.
    if let Some(fixture) = FIXTURE.get() {
        assert_eq!(fixture.load(3), 7);
    }
    // SAFETY: the page is the test's own.
    let mapped = unsafe {
        libc::mmap(
            addr.map_addr(page_floor),
            PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    assert_ne!(mapped, libc::MAP_FAILED);
}

/// A stray fault reaches a handler that was installed with `flags`, which faults in turn; nothing is left of either.
fn chain_to_app_handler(flags: libc::c_int) {
    let mut mask = empty_set();
    // SAFETY: the set is initialised.
    unsafe { libc::sigaddset(&raw mut mask, libc::SIGUSR1) };
    install_app_handler(
        app_handler as *const () as libc::sighandler_t,
        libc::SA_SIGINFO | libc::SA_NODEFER | flags,
        mask,
    );
    Fixture::set_up();
    install(resolve).unwrap();
    let stack = current_alternate_stack();
    assert_ne!(stack.ss_size, 0, "Rust gives its threads one");
    let address = beyond_the_file();
    set_errno(libc::ENOTTY);
    assert_eq!(access(address.wrapping_add(77)), 0);
    assert_eq!(errno(), libc::ENOTTY);
    assert_eq!(CHAINED_TO.load(SeqCst), 1);
    assert_eq!(CHAINED_ADDR.load(SeqCst).addr(), address.addr() + 77);
    // The fault inside the chained handler was served.
    assert_eq!(FAULTS.load(SeqCst), 1);
    assert!(!async_signals_blocked());
    assert!(is_installed());
    let after = current_alternate_stack();
    assert_eq!(
        (after.ss_sp, after.ss_size, after.ss_flags),
        (stack.ss_sp, stack.ss_size, stack.ss_flags)
    );
}

#[test]
fn a_stray_fault_goes_to_the_handler_that_was_there_before() {
    let body = || {
        chain_to_app_handler(0);
        if cfg!(target_arch = "x86_64") {
            assert!(!CHAINED_ON_ALTERNATE.load(SeqCst), "it did not ask for it");
        }
    };
    let name = test_name!("a_stray_fault_goes_to_the_handler_that_was_there_before");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn a_handler_that_asked_for_the_alternate_stack_has_room_for_a_fault_there() {
    let body = || {
        chain_to_app_handler(libc::SA_ONSTACK);
        assert!(CHAINED_ON_ALTERNATE.load(SeqCst));
    };
    let name =
        test_name!("a_handler_that_asked_for_the_alternate_stack_has_room_for_a_fault_there");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

extern "C" fn plain_app_handler(signal: libc::c_int) {
    assert_eq!(signal, libc::SIGBUS);
    let mut mask = empty_set();
    // SAFETY: reads the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) };
    // SAFETY: the set is initialised.
    let blocked = unsafe { libc::sigismember(&raw const mask, libc::SIGBUS) };
    assert_eq!(blocked, 1, "without SA_NODEFER it is blocked");
    CHAINED_TO.fetch_add(1, SeqCst);
}

#[test]
fn a_plain_handler_that_asked_for_one_shot_gets_one() {
    let body = || {
        install_app_handler(
            plain_app_handler as *const () as libc::sighandler_t,
            libc::SA_RESETHAND,
            empty_set(),
        );
        install(resolve).unwrap();
        // SAFETY: no preconditions.
        unsafe { libc::raise(libc::SIGBUS) };
        assert_eq!(CHAINED_TO.load(SeqCst), 1);
        super::super::process::write_stderr(b"handled once\n");
        // SAFETY: no preconditions.
        unsafe { libc::raise(libc::SIGBUS) };
    };
    let name = test_name!("a_plain_handler_that_asked_for_one_shot_gets_one");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_killed_by(libc::SIGBUS);
        assert!(ended.stderr.contains("handled once"), "{}", ended.stderr);
    }
}

/// The code of the signal that poison raises, seen by the handler that was there before.
static POISON_CODE: AtomicI32 = AtomicI32::new(0);

#[test]
fn poison_that_the_resolver_declines_reaches_the_previous_handler() {
    fn declines(_: &BusFault) -> Verdict {
        FAULTS.fetch_add(1, SeqCst);
        Verdict::NotOurs
    }
    extern "C" fn app(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel's siginfo, passed on.
        POISON_CODE.store(unsafe { (*info).si_code }, SeqCst);
        let fixture = FIXTURE.get().expect("set up");
        let source = fixture.source.range().start();
        // SAFETY: the page is registered with this descriptor. COPY overwrites a marker.
        let copied = unsafe {
            fixture
                .uffd
                .copy(fixture.page(2), source, Protect::No, Wake::No)
        };
        assert!(copied.is_complete());
    }
    let body = || {
        let fixture = Fixture::set_up();
        if !fixture.uffd.enabled().contains(Features::POISON) {
            return;
        }
        let app = app as *const () as libc::sighandler_t;
        install_app_handler(app, libc::SA_SIGINFO, empty_set());
        install(declines).unwrap();
        // SAFETY: the page is registered with this descriptor.
        let poisoned = unsafe { fixture.uffd.poison(fixture.page(2), Wake::No) };
        assert!(poisoned.is_complete());
        assert_eq!(fixture.load(2), 7);
        // Offered to the resolver only where the kernel does not say what it is.
        match POISON_CODE.load(SeqCst) {
            libc::BUS_MCEERR_AR => assert_eq!(FAULTS.load(SeqCst), 0),
            libc::BUS_ADRERR => assert_eq!(FAULTS.load(SeqCst), 1),
            code => panic!("poison raised code {code}"),
        }
    };
    let name = test_name!("poison_that_the_resolver_declines_reaches_the_previous_handler");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn a_forked_child_finds_the_table_empty() {
    fn forks(fault: &BusFault) -> Verdict {
        // The child is this thread, with this thread pointer, and is not in any resolver.
        // SAFETY: the child calls only what is async-signal-safe.
        if unsafe { libc::fork() } == 0 {
            let installed = super::installed().expect("installed");
            let status = match installed.resolving.enter(thread_pointer()) {
                Entered::As(_) => 42,
                Entered::Nested | Entered::Unguarded => 1,
            };
            // SAFETY: no preconditions.
            unsafe { libc::_exit(status) };
        }
        resolve(fault)
    }
    let body = || {
        let fixture = Fixture::set_up();
        install(forks).unwrap();
        assert_eq!(fixture.load(0), 7);
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        unsafe { libc::wait(&raw mut status) };
        assert_eq!(
            (libc::WIFEXITED(status), libc::WEXITSTATUS(status)),
            (true, 42)
        );
    };
    let name = test_name!("a_forked_child_finds_the_table_empty");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn guards_mask_asynchronous_signals_and_nest() {
    assert!(!async_signals_blocked());
    let outer = AsyncSignalsBlocked::new();
    assert!(async_signals_blocked());
    drop(AsyncSignalsBlocked::new());
    assert!(async_signals_blocked());
    let mut mask = empty_set();
    // SAFETY: reads the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) };
    for signal in SYNCHRONOUS {
        // SAFETY: the set is initialised and the number valid.
        assert_eq!(unsafe { libc::sigismember(&raw const mask, signal) }, 0);
    }
    drop(outer);
    assert!(!async_signals_blocked());
}

#[test]
fn thread_pointers_tell_threads_apart() {
    let own = thread_pointer();
    assert_eq!(own, thread_pointer());
    let other = std::thread::spawn(thread_pointer).join().unwrap();
    assert!(other != own && other != 0 && own != 0);
}

#[test]
fn a_full_bucket_leaves_the_surplus_unguarded() {
    let table = MapBox::<Resolving>::zeroed().unwrap();
    // Multiples of 2^57's inverse would be cleverer; a search is plainer.
    let colliding: Vec<usize> = (1..)
        .map(|n| n * 64)
        .filter(|&thread| (thread as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57 == 5)
        .take(BUCKET_LEN + 1)
        .collect();
    let (surplus, fitting) = colliding.split_last().unwrap();
    for &thread in fitting {
        assert!(matches!(table.enter(thread), Entered::As(_)));
        assert!(matches!(table.enter(thread), Entered::Nested));
    }
    assert!(matches!(table.enter(*surplus), Entered::Unguarded));
}

/// What [`park_late`] was told: the address, and whether it was a store.
static LATE_AT: AtomicUsize = AtomicUsize::new(0);
static LATE_STORE: AtomicBool = AtomicBool::new(false);

fn park_late(fault: &BusFault) -> Verdict {
    if !fault.late {
        return Verdict::NotOurs;
    }
    LATE_STORE.store(fault.access == Access::WriteMissing, SeqCst);
    LATE_AT.store(fault.addr, SeqCst);
    Verdict::Park
}

#[test]
fn a_thread_asleep_in_a_fault_is_told_and_parked() {
    let name = test_name!("a_thread_asleep_in_a_fault_is_told_and_parked");
    let ended = in_child(name, &[], || {
        static TID: AtomicU32 = AtomicU32::new(0);
        static WENT_ON: AtomicBool = AtomicBool::new(false);
        install(park_late).unwrap();
        let uffd = Uffd::open(FaultScope::UserMode, Features::empty()).unwrap();
        let memory =
            Reservation::congruent_to(PageRange::from_pages(0x20_0000, 1).unwrap()).unwrap();
        // SAFETY: the memory is the test's own; only raw pointers lead there.
        unsafe { uffd.register(memory.range(), Mode::MISSING) }.unwrap();
        let addr = memory.range().start() + 40;
        std::thread::spawn(move || {
            let _masked = AsyncSignalsBlocked::new();
            TID.store(super::super::process::gettid(), SeqCst);
            // SAFETY: in bounds; nobody resolves it.
            unsafe { std::ptr::with_exposed_provenance_mut::<u8>(addr).write_volatile(1) };
            WENT_ON.store(true, SeqCst);
        });
        while !uffd.has_message() {
            std::thread::yield_now();
        }
        assert_eq!(
            send_late(usize::MAX >> 33, addr, true)
                .unwrap_err()
                .raw_os_error(),
            Some(libc::ESRCH)
        );
        send_late(TID.load(SeqCst) as usize, addr, true).unwrap();
        while LATE_AT.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(
            (LATE_AT.load(SeqCst), LATE_STORE.load(SeqCst)),
            (addr, true)
        );
        // Memory that comes back: it does not go on.
        uffd.unregister(memory.range()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!WENT_ON.load(SeqCst));
    });
    if let Some(ended) = ended {
        ended.assert_passed();
    }
}
