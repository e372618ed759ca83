# Completion of tpvpn for bash: `source <(tpvpn completion bash)`, or into /usr/share/bash-completion/completions/tpvpn.
_tpvpn() {
    local word line index
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        [ "${COMP_WORDS[index]}" = -- ] || continue
        # What stands behind it is another command line, which bash-completion knows how to complete.
        if declare -F _command_offset >/dev/null; then
            _command_offset $((index + 1))
        elif ((index + 1 == COMP_CWORD)); then
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}")
        else
            compopt -o default 2>/dev/null
        fi
        return
    done
    while IFS= read -r line; do
        case $line in
        :0) compopt -o default 2>/dev/null ;;
        :*) ;;
        *) COMPREPLY+=("${line%%$'\t'*}") ;;
        esac
    done < <("${COMP_WORDS[0]/#\~/$HOME}" __complete --line "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _tpvpn tpvpn
