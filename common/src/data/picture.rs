//! A picture from a file's bytes, at a size: the same bytes on every machine.
//!
//! Both decoders are built without vector instructions of their own (`zune-jpeg` without its features "x86" and "neon"), and
//! what is added up here is added up in one order.

use std::io::Cursor;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Memory that a PNG's decoder may take: enough for 8,192 x 8,192 pixels of four channels.
const MOST: usize = 1 << 28;

/// Height and width.
type Size = [usize; 2];

/// Pixels one after another, row by row, each with its channels.
struct Decoded {
    size: Size,
    /// 1 (grey), 2 (grey, alpha), 3 (red, green, blue) or 4 (and alpha).
    channels: usize,
    bytes: Vec<u8>,
}

fn png(bytes: &[u8]) -> Result<Decoded, String> {
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: MOST });
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(|e| e.to_string())?;
    let len = reader.output_buffer_size().filter(|len| *len <= MOST).ok_or("it has too many pixels")?;
    let mut bytes = vec![0; len];
    let info = reader.next_frame(&mut bytes).map_err(|e| e.to_string())?;
    let size = [info.height as usize, info.width as usize];
    Ok(Decoded { size, channels: info.color_type.samples(), bytes })
}

fn jpeg(bytes: &[u8]) -> Result<Decoded, String> {
    // The decoder makes up what a file that was cut short does not have. Between the last start of a scan and the end of the
    // picture, no other bytes look like these markers.
    let last = |marker: u8| bytes.windows(2).rposition(|two| two == [0xff, marker]);
    if last(0xd9) <= last(0xda) {
        return Err("it ends too early".into());
    }
    let options = DecoderOptions::default().jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let bytes = decoder.decode().map_err(|e| e.to_string())?;
    let info = decoder.info().ok_or("it has no header")?;
    Ok(Decoded { size: [info.height.into(), info.width.into()], channels: 3, bytes })
}

impl Decoded {
    /// One channel of a pixel: of 3 they are red, green and blue, of 1 it is grey; alpha is left out.
    fn value(&self, y: usize, x: usize, channel: usize, channels: usize) -> u8 {
        let pixel = &self.bytes[(y * self.size[1] + x) * self.channels..][..self.channels];
        match (channels, pixel) {
            (3, [red, green, blue, ..]) => [red, green, blue][channel].to_owned(),
            // Rec. ITU-R BT.601, rounded.
            (_, &[red, green, blue, ..]) => {
                ((299 * u32::from(red) + 587 * u32::from(green) + 114 * u32::from(blue) + 500) / 1000) as u8
            }
            (_, _) => pixel[0],
        }
    }
}

/// For each of `to` pixels, the first of those that it is made of and their weights, whose sum is 1: `from` pixels begin at
/// `start`. A triangle as wide as two of the larger pixels, so that none is passed over where there are fewer than before.
fn weights(start: usize, from: usize, to: usize) -> Vec<(usize, Vec<f64>)> {
    let scale = from as f64 / to as f64;
    let reach = scale.max(1.0);
    let of_pixel = |i: usize| {
        let center = (i as f64 + 0.5) * scale - 0.5;
        let first = (center - reach).ceil().max(0.0) as usize;
        let last = ((center + reach).floor() as usize).min(from - 1);
        let raw: Vec<f64> = (first..=last).map(|j| (1.0 - (j as f64 - center).abs() / reach).max(0.0)).collect();
        let sum: f64 = raw.iter().sum();
        (start + first, raw.into_iter().map(|weight| weight / sum).collect())
    };
    (0..to).map(of_pixel).collect()
}

/// The largest part in the middle of `from` with the aspect ratio of `to`: where it begins, and its size.
fn middle([height, width]: Size, [to_height, to_width]: Size) -> (Size, Size) {
    let fitting = |side: usize, to: usize, other: usize| ((side * to + other / 2) / other).max(1);
    let size = [height.min(fitting(width, to_height, to_width)), width.min(fitting(height, to_width, to_height))];
    ([(height - size[0]) / 2, (width - size[1]) / 2], size)
}

fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    let picture = match bytes {
        [0x89, b'P', b'N', b'G', ..] => png(bytes)?,
        [0xff, 0xd8, ..] => jpeg(bytes)?,
        _ => return Err("it does not begin as one".into()),
    };
    if picture.size.contains(&0) {
        return Err("it has no pixels".into());
    }
    Ok(picture)
}

/// Height and width of the picture in `bytes`, and whether all of it is grey.
///
/// # Errors
/// Why it cannot be read.
pub fn measure(bytes: &[u8]) -> Result<([usize; 2], bool), String> {
    let picture = decode(bytes)?;
    let grey = |pixel: &[u8]| pixel.len() < 3 || (pixel[0] == pixel[1] && pixel[1] == pixel[2]);
    Ok((picture.size, picture.bytes.chunks_exact(picture.channels).all(grey)))
}

/// Writes the picture in `bytes` to `out`: `(channels, height, width)`.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn read(bytes: &[u8], size: Size, channels: usize, out: &mut [u8]) -> Result<(), String> {
    let picture = decode(bytes)?;
    let [height, width] = size;
    let ([top, left], [rows, columns]) = middle(picture.size, size);
    let (down, across) = (weights(top, rows, height), weights(left, columns, width));
    // Lines of the source at the new width, for one channel.
    let mut lines = vec![0.0; rows * width];
    for (channel, out) in out.chunks_exact_mut(height * width).enumerate() {
        for (y, line) in lines.chunks_exact_mut(width).enumerate() {
            for ((first, weights), value) in across.iter().zip(line) {
                let pixel = |x: usize| f64::from(picture.value(top + y, x, channel, channels));
                *value = (*first..).zip(weights).map(|(x, weight)| pixel(x) * weight).sum();
            }
        }
        for ((first, weights), out) in down.iter().zip(out.chunks_exact_mut(width)) {
            for (x, out) in out.iter_mut().enumerate() {
                let value = |y: usize| lines[(y - top) * width + x];
                let sum: f64 = (*first..).zip(weights).map(|(y, weight)| value(y) * weight).sum();
                *out = (sum + 0.5).floor().clamp(0.0, 255.0) as u8;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A PNG of these pixels.
    pub fn encoded(color: png::ColorType, [height, width]: Size, pixels: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
        encoder.set_color(color);
        encoder.write_header().unwrap().write_image_data(pixels).unwrap();
        bytes
    }

    fn pixels(bytes: &[u8], size: Size, channels: usize) -> Result<Vec<u8>, String> {
        let mut out = vec![7; channels * size[0] * size[1]];
        read(bytes, size, channels, &mut out).map(|()| out)
    }

    /// 24 x 16 pixels of smooth colours, whose last rows are grey.
    const JPEG: &[u8] = include_bytes!("picture.jpg");

    #[test]
    fn pixels_of_the_same_size_stay_as_they_are() {
        let grey: Vec<u8> = (0..12).map(|i| i * 20).collect();
        let file = encoded(png::ColorType::Grayscale, [3, 4], &grey);
        assert_eq!(pixels(&file, [3, 4], 1).unwrap(), grey);
        assert_eq!(pixels(&file, [3, 4], 3).unwrap(), [&grey[..], &grey, &grey].concat());
        let file = encoded(png::ColorType::Rgba, [1, 2], &[10, 20, 30, 0, 40, 50, 60, 255]);
        assert_eq!(pixels(&file, [1, 2], 3).unwrap(), [10, 40, 20, 50, 30, 60]);
        // 0.299, 0.587 and 0.114 of red, green and blue.
        assert_eq!(pixels(&file, [1, 2], 1).unwrap(), [18, 48]);
        let file = encoded(png::ColorType::GrayscaleAlpha, [1, 2], &[10, 0, 40, 255]);
        assert_eq!(pixels(&file, [1, 2], 3).unwrap(), [10, 40, 10, 40, 10, 40]);
    }

    #[test]
    fn the_middle_is_taken_and_averaged() {
        let grey: Vec<u8> = vec![0, 10, 20, 30, 40, 50, 100, 110, 120, 130, 140, 150];
        let file = encoded(png::ColorType::Grayscale, [2, 6], &grey);
        // Columns 2 and 3, each pixel of two by two weighted alike.
        assert_eq!(pixels(&file, [1, 1], 1).unwrap(), [75]);
        assert_eq!(pixels(&file, [2, 2], 1).unwrap(), [20, 30, 120, 130]);
        // Twice as many: between two pixels a quarter and three quarters of them.
        let file = encoded(png::ColorType::Grayscale, [1, 2], &[0, 100]);
        assert_eq!(pixels(&file, [2, 4], 1).unwrap(), [0, 25, 75, 100, 0, 25, 75, 100]);
    }

    #[test]
    fn a_jpeg_is_the_same_everywhere() {
        let got = pixels(JPEG, [16, 24], 3).unwrap();
        for (y, x) in (0..10).flat_map(|y| (0..24).map(move |x| (y, x))) {
            let drawn = [10 * x as i32, 15 * y as i32, 255 - 8 * x as i32];
            let far = (0..3).map(|c| (i32::from(got[(c * 16 + y) * 24 + x]) - drawn[c]).abs()).max().unwrap();
            assert!(far <= 24, "{y} {x}: {far}");
        }
        assert_eq!(blake3::hash(&got).to_hex()[..16], *"8789558042d2662b");
    }

    #[test]
    fn what_is_no_picture_says_why() {
        let png = encoded(png::ColorType::Grayscale, [3, 4], &[9; 12]);
        assert!(pixels(b"GIF89a", [1, 1], 1).unwrap_err().contains("does not begin"));
        assert!(pixels(&[], [1, 1], 1).is_err());
        for end in 0..png.len() - 12 {
            assert!(pixels(&png[..end], [1, 1], 1).is_err(), "cut at {end}");
        }
        for end in 0..JPEG.len() - 1 {
            assert!(pixels(&JPEG[..end], [1, 1], 3).is_err(), "cut at {end}");
        }
        let mut huge = png.clone();
        huge[16..24].fill(0x7f);
        assert!(pixels(&huge, [1, 1], 1).is_err());
    }

    proptest! {
        #[test]
        fn weights_are_of_pixels_that_are_there_and_add_up_to_1(from in 1usize..80, to in 1usize..80, start in 0usize..9) {
            for (first, weights) in weights(start, from, to) {
                prop_assert!(first >= start && first + weights.len() <= start + from && !weights.is_empty());
                prop_assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
        }

        #[test]
        fn the_middle_is_inside_and_of_the_aspect_ratio(from in [1usize..200, 1usize..200], to in [1usize..50, 1usize..50]) {
            let ([top, left], [rows, columns]) = middle(from, to);
            prop_assert!(rows >= 1 && columns >= 1 && top + rows <= from[0] && left + columns <= from[1]);
            prop_assert!(rows == from[0] || columns == from[1]);
            // To the nearest pixel.
            let off = (rows * to[1]).abs_diff(columns * to[0]);
            prop_assert!(2 * off <= to[0].max(to[1]) || rows == 1 || columns == 1, "{} {}", rows, columns);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), jpeg in any::<bool>(), at in any::<prop::sample::Index>()) {
            let start: &[u8] = if jpeg { &JPEG[..at.index(JPEG.len())] } else { &[0x89, b'P', b'N', b'G', 13, 10, 26, 10] };
            let _ = pixels(&[start, &bytes, &[0xff, 0xd9]].concat(), [2, 2], 3);
        }
    }
}
