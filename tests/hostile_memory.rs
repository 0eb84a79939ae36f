//! Goal: opening a pool takes no more memory and time than its bytes can mean, however they were
//! made up.
//!
//! Method: small pools whose metadata says next to nothing very often, or much of clusters that
//! are not there. Alone in its process, for the peak of its memory is what is measured.

mod common;

use common::{CLUSTER, POOL_LEN, disk, empty, opened};
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk;
use tidepool::format::catalogue::Row;
use tidepool::format::image::{LEAF_ENTRIES, Token, encode_token};
use tidepool::format::image_block::{BLOCK_HEADER_LEN, Extent, ImageStamp, seal_block, seal_head};
use tidepool::format::journal::{BatchWriter, Entry, Record, Stamp, decode_header};
use tidepool::format::superblock::{
    ImageRef, JOURNAL_AT, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock,
};
use tidepool::format::units::{ClusterSize, DiskId, Generation, Lcn};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, check, open};
use tidepool::storage::{SimStorage, Storage};
use tidepool::sys::clock;

/// Most memory that the whole test may take, bytes: the pools, and a few times as much.
const PEAK_MAX: u64 = 256 << 20;
/// Most clusters of an image made here.
const BLOCKS: u32 = 100;

/// The most memory this process ever had, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.expect("a line").parse::<u64>().expect("KiB") << 10
}

/// A pool with an image of `blocks`, whose extents are `extents`, or else what they should be.
fn with_image(blocks: &[Vec<u8>], extents: Option<Vec<Extent>>) -> Arc<SimStorage> {
    let storage = empty(POOL_LEN);
    let mut bytes = vec![0; SUPERBLOCK_LEN];
    storage.read_at(&mut bytes, 0).expect("reads");
    let mut superblock = Superblock::decode(&bytes).expect("just made");
    let uuid_low = u64::from_le_bytes(*superblock.uuid.first_chunk().expect("16 bytes"));
    let stamp = ImageStamp { uuid_low, seq: 0 };
    let first = superblock.cluster_count - 200;
    let mut block = common::bytes(0, CLUSTER);
    for (number, tokens) in (0_u32..).zip(blocks) {
        seal_block(stamp, number, tokens, &mut block);
        let at = u64::from(first + number) * CLUSTER;
        storage.write_at(&block, at).expect("writes");
    }
    let count = u32::try_from(blocks.len()).expect("few");
    let extents = extents.unwrap_or_else(|| {
        vec![Extent {
            start: first,
            count,
        }]
    });
    let head = first - 1;
    seal_head(stamp, (0, 0), &extents, &mut block);
    let at = u64::from(head) * CLUSTER;
    storage.write_at(&block, at).expect("writes");
    let len = u64::from(count) * CLUSTER;
    // As releases wrote them before there were copies and parity.
    superblock.image = Some(ImageRef {
        seq: 0,
        len,
        head,
        head_copy: 0,
    });
    superblock.generation += 1;
    for at in SUPERBLOCK_AT {
        let written = storage.write_durable_at(&superblock.encode(), at);
        written.expect("writes");
    }
    storage
}

fn encoded(token: &Token) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_token(token, &mut bytes).expect("short");
    bytes
}

/// Blocks with the tokens `first`, `last` and, between them, `token` as often as fits.
fn blocks(first: &[Token], token: &Token, last: &[Token]) -> Vec<Vec<u8>> {
    let len = usize::try_from(CLUSTER).expect("small") - BLOCK_HEADER_LEN;
    let mut blocks = vec![first.iter().flat_map(encoded).collect::<Vec<u8>>()];
    let token = encoded(token);
    for _ in 1..BLOCKS {
        blocks.push(token.repeat(len / token.len()));
    }
    blocks.push(last.iter().flat_map(encoded).collect());
    blocks
}

const START: Token = Token::Start {
    generation: Generation(1),
    next_disk: DiskId(9),
};

fn end(blocks: &[Vec<u8>], token: &Token, others: u64, disks: u64) -> Token {
    let between: usize = blocks[1..blocks.len() - 1].iter().map(Vec::len).sum();
    let nodes = between / encoded(token).len();
    Token::End {
        nodes: u64::try_from(nodes).expect("small") + others,
        disks,
    }
}

/// An image with nodes like `token` and nothing else.
fn many(token: &Token) -> Arc<SimStorage> {
    let made = blocks(&[START], token, &[]);
    let end = end(&made, token, 0, 0);
    with_image(&blocks(&[START], token, &[end]), None)
}

fn inner(level: u8, child: u32) -> Token {
    let fanout = if level == 3 { 256 } else { 512 };
    let children = (0..fanout).map(|place| (place, child)).collect();
    Token::Inner { level, children }
}

/// Roots that each have one node 256 times, which has one node 512 times, which has one leaf.
fn nested() -> Arc<SimStorage> {
    let zeros = Entry {
        zero: u16::MAX,
        ..Entry::default()
    };
    let first = [
        START,
        Token::Leaf(Box::new([zeros; LEAF_ENTRIES])),
        inner(1, 0),
        inner(2, 1),
    ];
    let root = inner(3, 2);
    let rows = (1..200).map(|id| Token::Disk {
        row: Box::new(row(id)),
        root: Some(id + 2),
        last_fork: Generation(0),
        changed: Generation(0),
    });
    let mut made = blocks(&first, &root, &[]);
    let end = end(&made, &root, 3, 199);
    made.pop();
    let mut block = Vec::new();
    for token in rows.chain([end]) {
        let token = encoded(&token);
        if block.len() + token.len() > usize::try_from(CLUSTER).expect("small") / 2 {
            made.push(std::mem::take(&mut block));
        }
        block.extend(token);
    }
    made.push(block);
    with_image(&made, None)
}

fn row(id: u32) -> Row {
    let (_storage, pool) = common::fresh();
    drop(disk(&pool, "d", CLUSTER));
    let row = pool.find("d").expect("there").row;
    let id = DiskId(id);
    Row {
        id,
        family: id,
        name: format!("d{}", id.0),
        ..row
    }
}

/// Leaves full of clusters that are far apart and not there, each copied once.
fn far_clusters() -> Arc<SimStorage> {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    drop(disk(&pool, "d", 64 * 64 * CLUSTER));
    cowdisk::fork(&pool, "d", &["e".to_owned()]).expect("forks");
    let [d, e] = ["d", "e"].map(|name| pool.find(name).expect("there").row.id);
    drop(pool);
    let mut records = Vec::new();
    let map = |lcn: u32, own: u32| Record::Map {
        disk: d,
        lcn: Lcn(lcn),
        entry: Entry {
            own,
            alloc: 1,
            ..Entry::default()
        },
    };
    for lcn in 0..64 * 64 {
        records.push(map(lcn, (lcn + 1) << 16));
    }
    records.push(Record::Fork {
        from: d,
        to: e,
        generation: Generation(7),
    });
    for leaf in 0..64 {
        records.push(map(leaf * 64, 7));
    }
    append(&storage, &records);
    storage
}

/// Disks of the largest size, with a limit, that are zeros from end to end.
fn vast_zeros() -> Arc<SimStorage> {
    let storage = empty(POOL_LEN);
    drop(disk(&opened(&storage), "first", CLUSTER));
    let mut records = Vec::new();
    for id in 100..120 {
        let row = Row {
            size: u64::from(u32::MAX) * CLUSTER,
            limit: Some(1 << 20),
            ..row(id)
        };
        records.push(Record::Row(Box::new(row)));
        records.push(Record::Unmap {
            disk: DiskId(id),
            first: Lcn(0),
            count: u32::MAX,
            is_zeroed: true,
        });
    }
    append(&storage, &records);
    storage
}

/// An empty pool of about as many clusters as there can be. That many places of one byte each would
/// be too many already.
fn vast_pool() -> Arc<SimStorage> {
    let size = 63 << 40;
    let cluster_size = ClusterSize::from_bytes(16 << 10).expect("the smallest");
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(size)
    };
    let storage = Arc::new(SimStorage::new(size));
    open::create(&*storage, &options).expect("makes");
    storage
}

/// Puts `records` behind the last batch of the journal.
fn append(storage: &SimStorage, records: &[Record]) {
    let mut at = JOURNAL_AT;
    let mut last = None;
    loop {
        let mut block = common::bytes(0, 4096);
        storage.read_at(&mut block, at).expect("reads");
        let Ok(header) = decode_header(&block) else {
            break;
        };
        at += header.len;
        last = Some(header);
    }
    let last = last.expect("some batch");
    let mut batch = BatchWriter::default();
    for record in records {
        batch.push(record).expect("short");
    }
    let stamp = Stamp {
        seq: last.stamp.seq + 1,
        prev_crc: last.crc,
        ..last.stamp
    };
    let (bytes, _) = batch.seal(stamp);
    storage.write_durable_at(&bytes, at).expect("writes");
}

#[test]
fn what_says_little_takes_little() {
    let everything = Extent {
        start: 1,
        count: u32::try_from(POOL_LEN / CLUSTER).expect("small") - 1,
    };
    let nothing = vec![
        [START, end(&[vec![], vec![]], &START, 0, 0)]
            .iter()
            .flat_map(encoded)
            .collect(),
    ];
    let childless = |level| Token::Inner {
        level,
        children: Vec::new(),
    };
    let leaf = Token::Leaf(Box::new([Entry::default(); LEAF_ENTRIES]));
    let cases = [
        ("leaves of nothing", many(&leaf), true),
        ("low nodes of nothing", many(&childless(1)), true),
        ("high nodes of nothing", many(&childless(3)), true),
        ("one node everywhere", nested(), true),
        ("zeros from end to end", vast_zeros(), true),
        ("a pool of nothing", vast_pool(), true),
        (
            "everything, again and again",
            with_image(&nothing, Some(vec![everything; 2000])),
            false,
        ),
        ("clusters that are not there", far_clusters(), false),
    ];
    for (what, storage, opens) in cases {
        let began = clock::now();
        let options = OpenOptions {
            is_read_only: true,
            ..OpenOptions::default()
        };
        let store = Arc::clone(&storage) as Arc<dyn Storage>;
        let opened = Pool::open(store, &options).map(drop);
        assert_eq!(opened.is_ok(), opens, "{what}: {opened:?}");
        let report = check::check(&*storage).expect("reads");
        assert_eq!(report.faults.is_empty(), opens, "{what}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(10), "{what}: {took:?}");
        let peak = peak();
        assert!(peak < PEAK_MAX, "{what}: {} MiB", peak >> 20);
    }
}
