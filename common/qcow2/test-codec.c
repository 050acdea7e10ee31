/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Decompression: what stands behind the data, and what is wrong with it. */

#include <config.h>

#include <errno.h>
#include <string.h>
#include <zlib.h>

#ifdef HAVE_LIBZSTD
#include <zstd.h>
#endif

#include "qcow2/codec.h"
#include "qcow2/error.h"

#define SIZE 65536

/* Half of it noise, the other half of one value. */
static void
fill (uint8_t *buf, size_t size)
{
  for (size_t i = 0; i < size; ++i)
    buf[i] = i < size / 2 ? (i * i * 2654435761u) >> 13 : 42;
}

/* As QEMU compresses: raw, with a window of 4 KiB. */
static size_t
deflate_raw (const uint8_t *src, size_t size, uint8_t *dst, size_t room,
             int window)
{
  z_stream strm = {
    .next_in = (uint8_t *) src, .avail_in = size,
    .next_out = dst, .avail_out = room,
  };

  g_assert_cmpint (deflateInit2 (&strm, 9, Z_DEFLATED, window, 9,
                                 Z_DEFAULT_STRATEGY), ==, Z_OK);
  g_assert_cmpint (deflate (&strm, Z_FINISH), ==, Z_STREAM_END);
  deflateEnd (&strm);
  return room - strm.avail_out;
}

static void
expect (enum qcow2_compression type, const uint8_t *src, size_t src_size,
        const uint8_t *right)
{
  g_autofree uint8_t *out = g_malloc (SIZE);
  g_autoptr (GError) error = NULL;

  qcow2_codec_decompress (type, src, src_size, out, SIZE, &error);
  g_assert_no_error (error);
  g_assert_cmpmem (out, SIZE, right, SIZE);
}

static void
expect_error (enum qcow2_compression type, const uint8_t *src,
              size_t src_size)
{
  g_autofree uint8_t *out = g_malloc (SIZE);
  g_autoptr (GError) error = NULL;

  g_assert_cmpint (qcow2_codec_decompress (type, src, src_size, out, SIZE,
                                           &error), ==, -1);
  g_assert_error (error, QCOW2_ERROR, EIO);
}

static void
test_deflate (void)
{
  g_autofree uint8_t *data = g_malloc (2 * SIZE), *z = g_malloc0 (4 * SIZE);
  size_t n;

  fill (data, 2 * SIZE);
  for (int window = -15; window <= -9; ++window) {
    n = deflate_raw (data, SIZE, z, 4 * SIZE, window);
    expect (QCOW2_COMPRESSION_DEFLATE, z, n, data);
    memset (z + n, 0xff, 500);  /* the next cluster's data */
    expect (QCOW2_COMPRESSION_DEFLATE, z, n + 500, data);
    expect_error (QCOW2_COMPRESSION_DEFLATE, z, n / 2);
  }
  /* A stream for more than a cluster. */
  n = deflate_raw (data, 2 * SIZE, z, 4 * SIZE, -12);
  expect (QCOW2_COMPRESSION_DEFLATE, z, n, data);
  /* One for less. */
  n = deflate_raw (data, SIZE - 1, z, 4 * SIZE, -12);
  expect_error (QCOW2_COMPRESSION_DEFLATE, z, n);
  memset (z, 0xff, SIZE);
  expect_error (QCOW2_COMPRESSION_DEFLATE, z, SIZE);
}

static void
test_zstd (void)
{
#ifdef HAVE_LIBZSTD
  g_autofree uint8_t *data = g_malloc (2 * SIZE), *z = g_malloc0 (4 * SIZE);
  size_t n, m;

  fill (data, 2 * SIZE);
  n = ZSTD_compress (z, 4 * SIZE, data, SIZE, 3);
  expect (QCOW2_COMPRESSION_ZSTD, z, n, data);
  memset (z + n, 0xff, 500);
  expect (QCOW2_COMPRESSION_ZSTD, z, n + 500, data);
  expect_error (QCOW2_COMPRESSION_ZSTD, z, n - 1);

  /* Two frames, and one that holds too much. */
  n = ZSTD_compress (z, 4 * SIZE, data, SIZE / 2, 3);
  expect_error (QCOW2_COMPRESSION_ZSTD, z, n);
  m = ZSTD_compress (z + n, 4 * SIZE - n, data + SIZE / 2, SIZE / 2, 3);
  expect (QCOW2_COMPRESSION_ZSTD, z, n + m, data);
  n = ZSTD_compress (z, 4 * SIZE, data, 2 * SIZE, 3);
  expect_error (QCOW2_COMPRESSION_ZSTD, z, n);
  memset (z, 0, SIZE);
  expect_error (QCOW2_COMPRESSION_ZSTD, z, SIZE);
#else
  g_test_skip ("built without libzstd");
#endif
}

int
main (int argc, char *argv[])
{
  g_test_init (&argc, &argv, NULL);
  g_test_add_func ("/codec/deflate", test_deflate);
  g_test_add_func ("/codec/zstd", test_zstd);
  return g_test_run ();
}
