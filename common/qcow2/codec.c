/* nbdkit-qcow2-filters
 * Copyright the nbdkit-qcow2-filters authors
 *
 * SPDX-License-Identifier: BSD-3-Clause
 * The full text is in the file LICENSE.
 */

/* Decompression of clusters.
 *
 * Deflate: raw streams.  libdeflate does most of the work, being two to
 * three times as fast as zlib; but it wants the whole stream to fit, and
 * QEMU accepts one that is longer than the cluster or runs into the next
 * cluster's bytes.  So whatever libdeflate declines is given to zlib,
 * whose answer counts.
 *
 * zstd: frames one after the other until the cluster is full.
 *
 * Decompressors hold state that is costly to set up, so each thread has
 * its own and keeps it until it ends.
 */

#include <config.h>

#include <stdint.h>
#include <zlib.h>

#ifdef HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif
#ifdef HAVE_LIBZSTD
#include <zstd.h>
#endif

#include "qcow2/codec.h"
#include "qcow2/error.h"

const char *
qcow2_codec_name (enum qcow2_compression type)
{
  return type == QCOW2_COMPRESSION_ZSTD ? "zstd" : "deflate";
}

bool
qcow2_codec_available (enum qcow2_compression type)
{
#ifdef HAVE_LIBZSTD
  return true;
#else
  return type != QCOW2_COMPRESSION_ZSTD;
#endif
}

#ifdef HAVE_LIBDEFLATE
static void
free_libdeflate (gpointer p)
{
  libdeflate_free_decompressor (p);
}

static GPrivate libdeflate_key = G_PRIVATE_INIT (free_libdeflate);

static bool
inflate_libdeflate (const void *src, size_t src_size,
                    void *dst, size_t dst_size)
{
  struct libdeflate_decompressor *d = g_private_get (&libdeflate_key);
  size_t consumed, produced;

  if (!d) {
    d = libdeflate_alloc_decompressor ();
    g_private_set (&libdeflate_key, d);
  }
  return d &&
    libdeflate_deflate_decompress_ex (d, src, src_size, dst, dst_size,
                                      &consumed, &produced)
    == LIBDEFLATE_SUCCESS && produced == dst_size;
}
#endif

static bool
inflate_zlib (const void *src, size_t src_size, void *dst, size_t dst_size)
{
  z_stream strm = {
    .next_in = (void *) src, .avail_in = src_size,
    .next_out = dst, .avail_out = dst_size,
  };
  int r;

  if (inflateInit2 (&strm, -15) != Z_OK)
    return false;
  r = inflate (&strm, Z_FINISH);
  inflateEnd (&strm);
  /* Z_BUF_ERROR: the stream goes on, but the cluster is full. */
  return (r == Z_STREAM_END || r == Z_BUF_ERROR) && strm.avail_out == 0;
}

static int
decompress_deflate (const void *src, size_t src_size,
                    void *dst, size_t dst_size, GError **error)
{
#ifdef HAVE_LIBDEFLATE
  if (inflate_libdeflate (src, src_size, dst, dst_size))
    return 0;
#endif
  if (inflate_zlib (src, src_size, dst, dst_size))
    return 0;
  return qcow2_fail (error, EIO, "the deflate data of a compressed cluster "
                     "is damaged");
}

#ifdef HAVE_LIBZSTD
static void
free_zstd (gpointer p)
{
  ZSTD_freeDCtx (p);
}

static GPrivate zstd_key = G_PRIVATE_INIT (free_zstd);

static int
decompress_zstd (const void *src, size_t src_size,
                 void *dst, size_t dst_size, GError **error)
{
  ZSTD_DCtx *ctx = g_private_get (&zstd_key);
  size_t n;

  if (!ctx) {
    ctx = ZSTD_createDCtx ();
    if (!ctx)
      return qcow2_fail (error, ENOMEM, "no memory for a zstd decompressor");
    g_private_set (&zstd_key, ctx);
  }

  while (dst_size > 0) {
    /* What follows the frame is not ours: find the frame's own length. */
    const size_t frame = ZSTD_findFrameCompressedSize (src, src_size);

    if (ZSTD_isError (frame))
      return qcow2_fail (error, EIO, "the zstd data of a compressed cluster "
                         "is damaged: %s", ZSTD_getErrorName (frame));
    n = ZSTD_decompressDCtx (ctx, dst, dst_size, src, frame);
    if (ZSTD_isError (n))
      return qcow2_fail (error, EIO, "the zstd data of a compressed cluster "
                         "is damaged: %s", ZSTD_getErrorName (n));
    src = (const char *) src + frame;
    src_size -= frame;
    dst = (char *) dst + n;
    dst_size -= n;
  }
  return 0;
}
#else
static int
decompress_zstd (const void *src, size_t src_size,
                 void *dst, size_t dst_size, GError **error)
{
  return qcow2_fail (error, ENOTSUP, "a cluster is compressed with zstd, "
                     "for which this build has no support");
}
#endif

int
qcow2_codec_decompress (enum qcow2_compression type,
                        const void *src, size_t src_size,
                        void *dst, size_t dst_size, GError **error)
{
  if (type == QCOW2_COMPRESSION_ZSTD)
    return decompress_zstd (src, src_size, dst, dst_size, error);
  return decompress_deflate (src, src_size, dst, dst_size, error);
}
