//! A map that keeps what was used last, within a bound.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// See the module.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    items: HashMap<K, Item<V>>,
    /// Keys by the time of their last use.
    used: BTreeMap<u64, K>,
    now: u64,
    weight: u64,
    weight_max: u64,
}

#[derive(Debug)]
struct Item<V> {
    value: V,
    weight: u64,
    used: u64,
}

impl<K: Clone + Eq + Hash, V: Clone> Cache<K, V> {
    /// An empty one for values that weigh `weight_max` together; the one used last is always kept.
    pub(super) fn new(weight_max: u64) -> Self {
        Self {
            items: HashMap::new(),
            used: BTreeMap::new(),
            now: 0,
            weight: 0,
            weight_max,
        }
    }

    /// The value of `key`, which counts as a use of it.
    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let item = self.items.get_mut(key)?;
        let key = self.used.remove(&item.used)?;
        self.now += 1;
        item.used = self.now;
        self.used.insert(self.now, key);
        Some(item.value.clone())
    }

    /// Adds a value; those that were not used for longest go.
    pub(super) fn put(&mut self, key: K, value: V, weight: u64) {
        self.remove(&key);
        while self.weight.saturating_add(weight) > self.weight_max {
            let Some((_, oldest)) = self.used.pop_first() else {
                break;
            };
            self.remove(&oldest);
        }
        self.now += 1;
        self.weight += weight;
        self.used.insert(self.now, key.clone());
        let used = self.now;
        self.items.insert(
            key,
            Item {
                value,
                weight,
                used,
            },
        );
    }

    fn remove(&mut self, key: &K) {
        if let Some(item) = self.items.remove(key) {
            self.used.remove(&item.used);
            self.weight -= item.weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let mut cache = Cache::new(10);
        for key in 0..5 {
            cache.put(key, key * 10, 2);
        }
        assert_eq!(cache.get(&0), Some(0));
        cache.put(5, 50, 3);
        let kept: Vec<_> = (0..6).filter(|key| cache.get(key).is_some()).collect();
        assert_eq!(kept, [0, 3, 4, 5]);
        cache.put(6, 60, 11);
        assert_eq!(
            (cache.get(&6), cache.get(&0), cache.weight),
            (Some(60), None, 11)
        );
        cache.put(6, 61, 1);
        assert_eq!(
            (cache.get(&6), cache.weight, cache.used.len()),
            (Some(61), 1, 1)
        );
    }
}
