//! Things that are known by a small number for as long as they are there.

/// See the module.
#[derive(Debug)]
pub(super) struct Slots<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            free: Vec::new(),
        }
    }
}

fn place(index: u32) -> usize {
    usize::try_from(index).expect("usize has at least 32 bits")
}

impl<T> Slots<T> {
    /// Adds what `make` makes of its number.
    pub(super) fn insert(&mut self, make: impl FnOnce(u32) -> T) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.items.push(None);
            u32::try_from(self.items.len() - 1).expect("bounded by descriptors")
        });
        self.items[place(index)] = Some(make(index));
        index
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<T> {
        let item = self.items.get_mut(place(index))?.take()?;
        self.free.push(index);
        Some(item)
    }

    pub(super) fn get(&self, index: u32) -> Option<&T> {
        self.items.get(place(index))?.as_ref()
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.items.get_mut(place(index))?.as_mut()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut().flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.len() == self.free.len()
    }
}
