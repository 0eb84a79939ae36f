# shellcheck shell=bash
# What the scripts share: messages, the cache, Debian packages, starting and stopping QEMU guests.
# Sourced, never run. Callers have set `set -euo pipefail`.

# shellcheck disable=SC2034 # used by those who source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Downloads and built guest images outlive `cargo clean` and are shared by all checkouts.
cache=${TIDEPOOL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tidepool}

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# tool NAME: makes `cargo NAME` available, from crates.io into the cache if need be.
PATH=$PATH:$cache/tools/bin
tool() {
    if [ -x "$(command -v "cargo-$1")" ]; then return 0; fi
    say "building cargo-$1 from crates.io"
    # quick to build rather than quick to run
    timeout 600 env -u CARGO_TARGET_DIR CARGO_PROFILE_RELEASE_{LTO=off,OPT_LEVEL=1,CODEGEN_UNITS=16} \
        cargo install -q --locked "cargo-$1" --root "$cache/tools"
}

# Runs a command as root; a plain user needs sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Prints those of the named packages that are not installed.
packages_missing() {
    local package
    for package in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) in
            installed) ;;
            *) printf '%s\n' "$package" ;;
        esac
    done
}

# Fetches package lists once a run, and only when a package cannot be found without.
apt_lists_fresh=
apt_refresh() {
    [ -z "$apt_lists_fresh" ] || return 0
    say "apt-get update"
    as_root apt-get -qq update || return 1
    apt_lists_fresh=yes
}

# Runs an apt-get command; when it fails, refreshes the lists and tries once more: stale lists
# name versions that the mirror no longer has.
apt_try() {
    "$@" 2>/dev/null || { apt_refresh && "$@"; }
}

# Installs those of the named packages that are missing. Two rounds: where one of them is there from
# backports, apt removes it to install the others from the release, and it comes back in the second.
packages_install() {
    local missing round
    for round in 1 2 last; do
        mapfile -t missing < <(packages_missing "$@")
        if [ ${#missing[@]} = 0 ]; then return 0; fi
        if [ "$round" = last ]; then fail "these packages do not stay installed: ${missing[*]}"; fi
        say "installing Debian packages: ${missing[*]}"
        apt_try as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
            --no-install-recommends -o Dpkg::Use-Pty=0 install "${missing[@]}" >/dev/null
    done
}

# Downloads a package without installing it and unpacks it to directory $2, unless that is done.
package_unpack() {
    local package=$1 dir=$2 work
    [ ! -d "$dir" ] || return 0
    say "downloading Debian package $package"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/download.XXXXXX")
    # apt's unprivileged download user cannot write here, and says so at length
    (cd "$work" && apt_try apt-get -qq -o APT::Sandbox::User=root download "$package")
    dpkg -x "$work"/*.deb "$work/tree"
    rm -rf "$dir"
    mkdir -p "$(dirname "$dir")"
    mv -T "$work/tree" "$dir"
    rm -rf "$work"
}

# guest_initrd IMAGE JOB OUT: the initramfs of directory IMAGE with the script JOB in it as /job.
# The kernel unpacks archives that follow each other into one tree.
guest_initrd() {
    local dir
    dir=$(mktemp -d)
    cp "$2" "$dir/job"
    { cat "$1/initrd.img"; (cd "$dir" && echo job | cpio --quiet -o -H newc -R 0:0 | gzip -n); } >"$3"
    rm -rf "$dir"
}

# guest_run IMAGE JOB CONSOLE SOCKET...: boots Linux from the vhost-user-blk disk at the first
# SOCKET (/dev/vda; the next is /dev/vdb), runs JOB in it and waits until it has powered off.
# CONSOLE receives the serial console. Fails unless the guest ran to its end and no step failed.
guest_run() {
    local image=$1 job=$2 console=$3 socket count=0 args=()
    shift 3
    guest_initrd "$image" "$job" "$console.initrd"
    for socket in "$@"; do
        args+=(-chardev "socket,id=c$count,path=$socket,reconnect=1"
            -device "vhost-user-blk-pci,chardev=c$count,num-queues=2")
        count=$((count + 1))
    done
    # TCG needs no KVM; the memory must be shared for the server to reach it
    timeout 300 qemu-system-x86_64 -machine q35,accel=tcg -cpu max -smp 2 -m 512 \
        -object memory-backend-memfd,id=m,size=512M,share=on -numa node,memdev=m \
        -nodefaults -no-reboot -display none -serial "file:$console" \
        -kernel "$image/vmlinuz" -initrd "$console.initrd" \
        -append "console=ttyS0 quiet panic=-1 no_timer_check root=/dev/vda" "${args[@]}" || return 1
    grep -q '^TIDEPOOL-GUEST: done' "$console" && ! grep -q '^TIDEPOOL-GUEST: fail' "$console"
}

# guest_value NAME CONSOLE: what the guest reported under that name.
guest_value() {
    tr -d '\r' <"$2" | sed -n "s/^TIDEPOOL-GUEST: value $1 //p"
}

# wait_for SECONDS COMMAND...: until the command succeeds; fails when it has not by then.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}
