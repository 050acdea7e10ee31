#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
#
# Show in a few seconds, on a real image, what the qcow2 filter does:
#
#   tests/demo.sh                make an image, serve it, and prove it right
#   tests/demo.sh IMAGE.qcow2    serve IMAGE.qcow2, describe it, copy it to
#                                IMAGE.qcow2.raw
#
# ./bootstrap demo [IMAGE.qcow2] installs what is needed, builds, and runs
# this.  NBDKIT names the build tree's nbdkit; without it the one in the
# current directory or beside the sources is used.

set -euo pipefail
export LC_ALL=C

# An ordinary user's PATH often lacks mkfs.ext4 and debugfs.
PATH=$PATH:/usr/sbin:/sbin

qemu_img=${QEMU_IMG:-qemu-img}
qemu_io=${QEMU_IO:-qemu-io}
nbdcopy=${NBDCOPY:-nbdcopy}
nbdinfo=${NBDINFO:-nbdinfo}

tmp=
server=
partial=

die ()
{
    echo "demo: $*" >&2
    exit 1
}

stop_server ()
{
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || :
        wait "$server" 2>/dev/null || :
        server=
    fi
}

cleanup ()
{
    stop_server
    if [ -n "$partial" ]; then rm -f -- "$partial"; fi
    if [ -n "$tmp" ]; then rm -rf -- "$tmp"; fi
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

need ()
{
    local program missing=
    for program; do
        type "$program" >/dev/null 2>&1 || missing+=" $program"
    done
    [ -z "$missing" ] || die "please install:$missing (./bootstrap does it)"
}

# A directory for us, with a name short enough for a socket in it.
make_tmp ()
{
    local base=${TMPDIR:-/tmp}
    [ ${#base} -le 60 ] || base=/tmp
    tmp=$(mktemp -d "$base/qcow2-demo.XXXXXX")
}

find_nbdkit ()
{
    local candidate
    for candidate in ${NBDKIT:+"$NBDKIT"} ./nbdkit \
                     "$(dirname -- "$0")/../nbdkit"; do
        if [ -x "$candidate" ]; then
            nbdkit=$(realpath -- "$candidate")
            return
        fi
    done
    die "there is no ./nbdkit: build first (./bootstrap demo does it)"
}

# Say what comes next.
say ()
{
    printf '\n* %s\n' "$*" | fold -s -w 78
}

# Show a command and what it says, indented.
show ()
{
    local word line=
    for word; do
        case $word in
            *[\ \?]*) line+=" '$word'" ;;
            *)        line+=" $word" ;;
        esac
    done
    printf '    $%s\n' "$line"
    "$@" 2>&1 | sed 's/^/    /' || die "that failed"
}

# The same for the lines of the output that match $1.
show_lines ()
{
    local lines=$1
    shift
    show "$@" > "$tmp/shown"
    sed -E "1s/\$/ | grep -E '$lines'/; 1!{/$lines/!d}" "$tmp/shown"
}

# Serve image $1 on the Unix socket $socket.
serve ()
{
    "$nbdkit" -f -r -U "$socket" -P "$tmp/pid" --filter=qcow2 \
              file file="$1" &
    server=$!
    # nbdkit writes its pid when it is ready to serve.
    while ! [ -s "$tmp/pid" ]; do
        kill -0 "$server" 2>/dev/null ||
            die "nbdkit can't serve $1; its own message is above"
        sleep 0.02
    done
}

uri ()
{
    echo "nbd+unix:///$1?socket=$socket"
}

same ()
{
    cmp -- "$1" "$2" || die "$3: they differ, which is a bug in the filter"
    echo "    equal: $3"
}

# Up to 1000 of this machine's own files go to directory files.
collect_files ()
{
    mkdir files
    # Names with a newline would end up as two names: leave them out.
    find /usr/bin /usr/lib /usr/share -xdev -type f -readable \
         -size +1k -size -256k ! -name '*
*' 2>/dev/null | sort > found
    # Every nth, so that all kinds of files are among them.
    awk -v all="$(wc -l < found)" \
        'BEGIN { step = int (all / 1000) + 1 } NR % step == 0' found > list
    [ -s list ] || die "there are no files in /usr to fill a disk with"
    # A file may go away meanwhile; what could be read is what we want.
    tar -cf - --ignore-failed-read -T list 2>/dev/null |
        tar -xf - -C files --no-same-owner
}

# One file system block with text that ends as a line does.
note ()
{
    printf '%-4095s\n' "This note was written $1 the snapshot was taken."
}

# Make disk.qcow2: a compressed file system of real files, snapshot
# "before", and then a change.
make_image ()
{
    local block
    collect_files
    note "before" > files/note.txt
    truncate -s 128M fs.raw
    mkfs.ext4 -q -F -b 4096 -L demo -d files fs.raw
    "$qemu_img" convert -f raw -O qcow2 -c fs.raw disk.qcow2
    "$qemu_img" snapshot -c before disk.qcow2

    # The change is one a file system could have made: other text in the
    # one block of note.txt.
    block=$(debugfs -R 'blocks /note.txt' fs.raw 2>/dev/null)
    note "after" > note.after
    "$qemu_io" -f qcow2 disk.qcow2 \
        -c "write -q -s note.after $((block * 4096)) 4096"
}

# The text of note.txt in the file system $1.
read_note ()
{
    debugfs -R 'cat /note.txt' "$1" 2>/dev/null | sed 's/ *$//'
}

# A large program among the files in the image, as a path inside it.
choose_file ()
{
    (cd files && find usr/bin usr -type f -printf '%H %s /%p\n' 2>/dev/null) |
        sort -k1,1r -k2,2nr | sed -n '1s/^[^ ]* [0-9]* //p'
}

compare_with_qemu ()
{
    say "Is what we served right?  QEMU, asked to convert the same image" \
        "itself, is the judge."
    "$qemu_img" convert -f qcow2 -O raw disk.qcow2 disk.qemu
    same disk.raw disk.qemu \
         "the disk, byte for byte ($(stat -c %s disk.raw) bytes)"
    "$qemu_img" convert -f qcow2 -O raw -l before disk.qcow2 snapshot.qemu
    same snapshot.raw snapshot.qemu "the snapshot, byte for byte"
}

read_files ()
{
    local file
    file=$(choose_file)
    say "The copies are ordinary disks.  A file read from the copied file" \
        "system, and the machine's own file that it came from:"
    debugfs -R "dump \"$file\" dumped" disk.raw 2>/dev/null
    same dumped "files$file" "$file"
    say "One file was changed after the snapshot.  It reads:"
    echo "    in the disk:     $(read_note disk.raw)"
    echo "    in the snapshot: $(read_note snapshot.raw)"
    [ "$(read_note disk.raw)" != "$(read_note snapshot.raw)" ] ||
        die "disk and snapshot are the same, which is a bug in the filter"
}

demo ()
{
    need mkfs.ext4 debugfs tar awk "$qemu_img" "$qemu_io" \
         "$nbdcopy" "$nbdinfo"
    make_tmp
    cd "$tmp"
    socket=socket
    say "Making a disk image as you might have one: an ext4 file system" \
        "with files of this machine, compressed, with a snapshot."
    make_image
    show ls -sh fs.raw disk.qcow2
    show "$qemu_img" snapshot -l disk.qcow2

    say "Serving it: nbdkit knows nothing of qcow2, the filter does."
    echo "    \$ ./nbdkit -r -U socket --filter=qcow2 file disk.qcow2"
    serve disk.qcow2
    say "What an NBD client sees: the disk inside the image, and one more" \
        "export for the snapshot."
    show_lines 'export|description' "$nbdinfo" --list "$(uri '')"
    say "Which parts of the disk hold data, and which need not be copied:"
    show "$nbdinfo" --map --totals "$(uri '')"
    say "Copying the disk and the snapshot:"
    show "$nbdcopy" "$(uri '')" disk.raw
    show "$nbdcopy" "$(uri @before)" snapshot.raw
    compare_with_qemu
    read_files
    say "So: a compressed qcow2 image was served over NBD without being" \
        "unpacked first; stock clients saw its size, its holes and its" \
        "snapshot, and what they copied is what QEMU says is in it."
    echo
    echo "With an image of yours: ./bootstrap demo IMAGE.qcow2"
}

copy_image ()
{
    local image=$1 copy=$1.raw uri
    need "$nbdcopy" "$nbdinfo"
    [ -f "$image" ] || die "$image: there is no such file"
    [ -r "$image" ] || die "$image: you are not permitted to read it"
    # -L too: a dangling link would be followed.
    if [ -e "$copy" ] || [ -L "$copy" ]; then
        die "$copy exists already and is not overwritten:" \
            "move it away or delete it first"
    fi
    make_tmp
    socket=$tmp/socket
    serve "$image"
    uri=$(uri '')
    say "Serving $image as $uri"
    "$nbdinfo" --size "$uri" > "$tmp/size" ||
        die "$image can't be opened; nbdkit's message is above"
    echo "    virtual size: $(numfmt --to=iec-i --suffix=B < "$tmp/size")" \
         "($(cat "$tmp/size") bytes)"
    say "Its map, in sums:"
    "$nbdinfo" --map --totals "$uri" | sed 's/^/    /'
    say "Copying it to $copy"
    # The name appears when the copy is whole, and never replaces a file.
    partial=$(mktemp -- "$copy.partial.XXXXXX")
    "$nbdcopy" -p "$uri" "$partial" || die "$image: it could not be copied"
    chmod -- "$(printf '%o' $((0666 & ~$(umask))))" "$partial"
    if ! ln -T -- "$partial" "$copy" 2>/dev/null; then
        [ ! -e "$copy" ] || die "$copy: somebody else has just made it"
        mv -nT -- "$partial" "$copy"     # no hard links here
    fi
    say "Done: $copy is the disk inside $image."
}

find_nbdkit
case $# in
    0) demo ;;
    1) copy_image "$1" ;;
    *) die "usage: $0 [IMAGE.qcow2]" ;;
esac
