//! `disk rebase`: a base that was moved, or put back from a copy.

use super::Rebase;
use super::change::with_pool;
use super::copy::Work;
use crate::cli::failure::Failure;
use crate::cli::human;
use crate::cli::output::{Output, Reply};
use crate::cowdisk::{self, Compared};
use serde_json::json;

pub(super) fn rebase(args: &Rebase, output: Output) -> Result<Reply, Failure> {
    let item = &args.item;
    let mut work = Work::begin(output, "comparing", true);
    let result = with_pool(item, "rebase", |pool| {
        let was = pool.find(&item.name)?.row.base.map(|base| base.format);
        let base = args.base.clone().map(|path| {
            let format = args.base_format.map(Into::into).or(was);
            (
                path,
                format.unwrap_or(crate::format::catalogue::BaseFormat::Raw),
            )
        });
        let how = cowdisk::Rebase {
            base,
            is_trusted: args.trust,
            is_alone: args.only,
        };
        cowdisk::rebase(pool, &item.name, &how, &mut |done, total| {
            work.step(done, total)
        })
    });
    let done = work.end(result, "nothing was changed")?;
    let (word, bytes, compared) = match done.compared {
        Compared::All(bytes) => (
            "all",
            bytes,
            format!("all {} compared", human::bytes(bytes)),
        ),
        Compared::Samples(bytes) => {
            let of = human::bytes(bytes);
            (
                "samples",
                bytes,
                format!("its size and {of} of samples compared"),
            )
        }
        Compared::Nothing => ("nothing", 0, "nothing compared".to_owned()),
    };
    let json = json!({
        "pool": item.pool,
        "base": done.path,
        "names": done.names,
        "compared": word,
        "compared_bytes": bytes,
    });
    let names = done.names.join(", ");
    let text = format!("{}: now the base of {names}; {compared}\n", done.path);
    Ok(Reply::new(json, text))
}
