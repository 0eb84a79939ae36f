//! Any bytes as the tokens of a checkpoint image: an error, or tokens the loader takes or refuses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidepool::format::image::{decode_token, encode_token};
use tidepool::format::image_block::{ImageStamp, unseal_block, unseal_head};
use tidepool::pool::image::Loader;

fuzz_target!(|data: &[u8]| {
    let stamp = ImageStamp { uuid_low: 1, seq: 2 };
    let _ = unseal_block(stamp, 0, data);
    let _ = unseal_head(stamp, 1000, data);
    let mut rest = data;
    let mut loader = Loader::default();
    while let Ok(Some(token)) = decode_token(&mut rest) {
        let mut again = Vec::new();
        encode_token(&token, &mut again).expect("it was decoded");
        assert_eq!(decode_token(&mut again.as_slice()), Ok(Some(token.clone())));
        if loader.feed(token).is_err() {
            return;
        }
    }
    let _ = loader.finish(2);
});
