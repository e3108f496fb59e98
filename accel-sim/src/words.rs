//! Elements, word by word: how a device touches memory that others may touch at the same time.
//!
//! No reference is ever made to such memory. A value of `T` is loaded and stored as relaxed atomic words of `T`'s alignment
//! (8 bytes at most), so that a race yields some mix of the words written, never undefined behaviour; `svm`'s shared views
//! use the same words. A word never straddles a page, but a value may: its words are found one by one.

use std::mem::MaybeUninit;
use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bytemuck::Pod;

/// Bytes of the atomic words that a `T` consists of.
pub(crate) const fn word_bytes<T>() -> usize {
    if align_of::<T>() > 8 {
        8
    } else {
        align_of::<T>()
    }
}

/// Loads a `T` whose byte `offset` lies at address `at(offset)`.
///
/// # Safety
///
/// For each multiple `o` of the word size below `size_of::<T>()`, `at(o)` is the exposed address of a word that is aligned,
/// mapped and readable for the whole call, and that is only accessed atomically meanwhile, in words of this size.
#[inline(always)]
pub(crate) unsafe fn load<T: Pod>(at: impl Fn(usize) -> usize) -> T {
    macro_rules! by {
        ($atomic:ty, $word:ty) => {{
            let mut value = MaybeUninit::<T>::uninit();
            let words = value.as_mut_ptr().cast::<$word>();
            for i in 0..size_of::<T>() / size_of::<$word>() {
                let place = with_exposed_provenance_mut::<$word>(at(i * size_of::<$word>()));
                // SAFETY: by contract the word is aligned, valid, and accessed atomically only.
                let place = unsafe { <$atomic>::from_ptr(place) };
                // SAFETY: `i` counts the words of `value`, which is aligned for them: `words` is `T`'s alignment or less.
                let slot = unsafe { words.add(i) };
                // SAFETY: the slot lies in `value`.
                unsafe { slot.write(place.load(Ordering::Relaxed)) };
            }
            // SAFETY: size is a multiple of alignment, so every byte was written; any bytes are a valid `Pod`.
            unsafe { value.assume_init() }
        }};
    }
    match word_bytes::<T>() {
        8 => by!(AtomicU64, u64),
        4 => by!(AtomicU32, u32),
        2 => by!(AtomicU16, u16),
        _ => by!(AtomicU8, u8),
    }
}

/// Stores a `T` whose byte `offset` lies at address `at(offset)`.
///
/// # Safety
///
/// As [`load`], and the words are writable.
#[inline(always)]
pub(crate) unsafe fn store<T: Pod>(at: impl Fn(usize) -> usize, value: T) {
    macro_rules! by {
        ($atomic:ty, $word:ty) => {{
            let words = (&raw const value).cast::<$word>();
            for i in 0..size_of::<T>() / size_of::<$word>() {
                let place = with_exposed_provenance_mut::<$word>(at(i * size_of::<$word>()));
                // SAFETY: by contract the word is aligned, valid, and accessed atomically only.
                let place = unsafe { <$atomic>::from_ptr(place) };
                // SAFETY: `i` counts the words of `value`.
                let word = unsafe { words.add(i) };
                // SAFETY: the word lies in `value`, whose bytes are all initialised: it is `Pod`.
                place.store(unsafe { word.read() }, Ordering::Relaxed);
            }
        }};
    }
    match word_bytes::<T>() {
        8 => by!(AtomicU64, u64),
        4 => by!(AtomicU32, u32),
        2 => by!(AtomicU16, u16),
        _ => by!(AtomicU8, u8),
    }
}

mod sealed {
    /// How an atomic number is updated in place.
    pub trait Update: Sized {
        /// # Safety
        /// `place` is the exposed address of an aligned value that is valid, writable and only accessed atomically.
        unsafe fn fetch_add(place: usize, operand: Self) -> Self;
        /// # Safety
        /// As `fetch_add`.
        unsafe fn fetch_min(place: usize, operand: Self) -> Self;
        /// # Safety
        /// As `fetch_add`.
        unsafe fn fetch_max(place: usize, operand: Self) -> Self;
        /// # Safety
        /// As `fetch_add`.
        unsafe fn swap(place: usize, value: Self) -> Self;
        /// # Safety
        /// As `fetch_add`.
        unsafe fn compare_exchange(place: usize, current: Self, new: Self) -> Result<Self, Self>;
    }
}

/// Numbers that a kernel can update atomically: the integers of 1 to 8 bytes, `f32` and `f64`.
///
/// Integers wrap. Floats are updated by compare-and-exchange of their bits; `compare_exchange` compares bits too.
pub trait Atomic: Pod + sealed::Update {}

macro_rules! atomic_integers {
    ($($number:ty: $atomic:ident),*) => { $(
        impl Atomic for $number {}
        impl sealed::Update for $number {
            #[inline(always)]
            unsafe fn fetch_add(place: usize, operand: Self) -> Self {
                let place = with_exposed_provenance_mut(place);
                // SAFETY: by contract aligned, valid, and accessed atomically only.
                unsafe { std::sync::atomic::$atomic::from_ptr(place) }.fetch_add(operand, Ordering::Relaxed)
            }
            #[inline(always)]
            unsafe fn fetch_min(place: usize, operand: Self) -> Self {
                let place = with_exposed_provenance_mut(place);
                // SAFETY: as in `fetch_add`.
                unsafe { std::sync::atomic::$atomic::from_ptr(place) }.fetch_min(operand, Ordering::Relaxed)
            }
            #[inline(always)]
            unsafe fn fetch_max(place: usize, operand: Self) -> Self {
                let place = with_exposed_provenance_mut(place);
                // SAFETY: as in `fetch_add`.
                unsafe { std::sync::atomic::$atomic::from_ptr(place) }.fetch_max(operand, Ordering::Relaxed)
            }
            #[inline(always)]
            unsafe fn swap(place: usize, value: Self) -> Self {
                let place = with_exposed_provenance_mut(place);
                // SAFETY: as in `fetch_add`.
                unsafe { std::sync::atomic::$atomic::from_ptr(place) }.swap(value, Ordering::Relaxed)
            }
            #[inline(always)]
            unsafe fn compare_exchange(place: usize, current: Self, new: Self) -> Result<Self, Self> {
                let place = with_exposed_provenance_mut(place);
                // SAFETY: as in `fetch_add`.
                let place = unsafe { std::sync::atomic::$atomic::from_ptr(place) };
                place.compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed)
            }
        }
    )* };
}

atomic_integers! {
    u8: AtomicU8, u16: AtomicU16, u32: AtomicU32, u64: AtomicU64, usize: AtomicUsize,
    i8: AtomicI8, i16: AtomicI16, i32: AtomicI32, i64: AtomicI64, isize: AtomicIsize
}

macro_rules! atomic_floats {
    ($($number:ty: $atomic:ident),*) => { $(
        impl Atomic for $number {}
        impl sealed::Update for $number {
            #[inline(always)]
            unsafe fn fetch_add(place: usize, operand: Self) -> Self {
                // SAFETY: by contract aligned, valid, and accessed atomically only.
                let place = unsafe { $atomic::from_ptr(with_exposed_provenance_mut(place)) };
                Self::from_bits(update(|| place.load(Ordering::Relaxed), |old| (Self::from_bits(old) + operand).to_bits(),
                    |old, new| place.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed)))
            }
            #[inline(always)]
            unsafe fn fetch_min(place: usize, operand: Self) -> Self {
                // SAFETY: as in `fetch_add`.
                let place = unsafe { $atomic::from_ptr(with_exposed_provenance_mut(place)) };
                Self::from_bits(update(|| place.load(Ordering::Relaxed), |old| Self::from_bits(old).min(operand).to_bits(),
                    |old, new| place.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed)))
            }
            #[inline(always)]
            unsafe fn fetch_max(place: usize, operand: Self) -> Self {
                // SAFETY: as in `fetch_add`.
                let place = unsafe { $atomic::from_ptr(with_exposed_provenance_mut(place)) };
                Self::from_bits(update(|| place.load(Ordering::Relaxed), |old| Self::from_bits(old).max(operand).to_bits(),
                    |old, new| place.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed)))
            }
            #[inline(always)]
            unsafe fn swap(place: usize, value: Self) -> Self {
                // SAFETY: as in `fetch_add`.
                let place = unsafe { $atomic::from_ptr(with_exposed_provenance_mut(place)) };
                Self::from_bits(place.swap(value.to_bits(), Ordering::Relaxed))
            }
            #[inline(always)]
            unsafe fn compare_exchange(place: usize, current: Self, new: Self) -> Result<Self, Self> {
                // SAFETY: as in `fetch_add`.
                let place = unsafe { $atomic::from_ptr(with_exposed_provenance_mut(place)) };
                place
                    .compare_exchange(current.to_bits(), new.to_bits(), Ordering::Relaxed, Ordering::Relaxed)
                    .map(Self::from_bits)
                    .map_err(Self::from_bits)
            }
        }
    )* };
}

atomic_floats! { f32: AtomicU32, f64: AtomicU64 }

/// A compare-and-exchange loop; returns the bits before.
#[inline(always)]
fn update<B: Copy>(
    load: impl Fn() -> B,
    next: impl Fn(B) -> B,
    exchange: impl Fn(B, B) -> Result<B, B>,
) -> B {
    let mut old = load();
    loop {
        match exchange(old, next(old)) {
            Ok(before) => return before,
            Err(seen) => old = seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sealed::Update;
    use super::*;

    #[test]
    fn every_alignment_round_trips() {
        fn check<T: Pod + PartialEq + std::fmt::Debug>(value: T) {
            let mut place = [value];
            place[0] = T::zeroed();
            let base = place.as_mut_ptr().expose_provenance();
            // SAFETY: `place` is ours alone, aligned, and long enough.
            unsafe { store(|o| base + o, value) };
            // SAFETY: as above.
            assert_eq!(unsafe { load::<T>(|o| base + o) }, value);
        }
        check(0xa5_u8);
        check([1_u8, 2, 3]);
        check([1_u16, 2, 3]);
        check([1.5_f32, 2.5, 3.5]);
        check([u64::MAX, 1, 2, 3, 4]);
        check(u128::MAX - 7);
        check(());
    }

    #[test]
    fn floats_update_like_numbers() {
        let mut place = [1.5_f64];
        let at = place.as_mut_ptr().expose_provenance();
        // SAFETY: `place` is ours alone and aligned, here and below.
        assert_eq!(unsafe { f64::fetch_add(at, 2.0) }, 1.5);
        // SAFETY: as above.
        assert_eq!(unsafe { f64::fetch_max(at, 9.0) }, 3.5);
        // SAFETY: as above.
        assert_eq!(unsafe { f64::fetch_min(at, 4.0) }, 9.0);
        // SAFETY: as above.
        assert_eq!(unsafe { f64::compare_exchange(at, 9.0, 1.0) }, Err(4.0));
        // SAFETY: as above.
        assert_eq!(unsafe { f64::swap(at, 0.0) }, 4.0);
    }
}
