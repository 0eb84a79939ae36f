//! `Arc` for what is let go of by several threads at once, where a checker sees who is first: the
//! count itself is the standard library's, and each look at it, and each end of a reference, is an
//! access to an atomic of the checker's.

use super::atomic::{AtomicU32, Ordering};
use std::ops::Deref;
use std::sync::Arc;

/// As `std::sync::Arc`. Making one more reference, and dropping one without asking whether it was the
/// last, are not seen.
#[derive(Debug, Default)]
pub struct Shared<T>(Arc<Inner<T>>);

#[derive(Debug, Default)]
struct Inner<T> {
    value: T,
    door: AtomicU32,
}

impl<T> Shared<T> {
    /// The only one.
    pub fn new(value: T) -> Self {
        let door = AtomicU32::new(0);
        Self(Arc::new(Inner { value, door }))
    }

    fn touch(&self) {
        self.0.door.fetch_add(1, Ordering::AcqRel);
    }

    /// As that of `Arc`.
    pub fn get_mut(this: &mut Self) -> Option<&mut T> {
        this.touch();
        Arc::get_mut(&mut this.0).map(|inner| &mut inner.value)
    }

    /// As that of `Arc`.
    pub fn into_inner(this: Self) -> Option<T> {
        this.touch();
        Arc::into_inner(this.0).map(|inner| inner.value)
    }

    /// As that of `Arc`.
    pub fn make_mut(this: &mut Self) -> &mut T
    where
        T: Clone,
    {
        if Self::get_mut(this).is_none() {
            let old = std::mem::replace(this, Self::new(T::clone(this)));
            drop(Self::into_inner(old));
        }
        Self::get_mut(this).expect("nobody else has a copy that was just made")
    }

    /// As that of `Arc`.
    pub fn strong_count(this: &Self) -> usize {
        this.touch();
        Arc::strong_count(&this.0)
    }

    /// As that of `Arc`.
    pub fn ptr_eq(this: &Self, other: &Self) -> bool {
        Arc::ptr_eq(&this.0, &other.0)
    }

    /// As that of `Arc`.
    pub fn as_ptr(this: &Self) -> *const T {
        &raw const this.0.value
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0.value
    }
}
