# Completion of tpvpn for fish: `tpvpn completion fish | source`, or into ~/.config/fish/completions/tpvpn.fish.
function __tpvpn_complete
    set -l words (commandline --tokenize --cut-at-cursor --current-process)
    set -l program (string replace --regex '^~' -- $HOME $words[1])
    set -l current (commandline --current-token --cut-at-cursor)
    set --erase words[1]
    if set -l cut (contains --index -- -- $words) # what stands behind it is another command line
        complete --do-complete (string join ' ' -- (string escape -- $words[$cut..]) $current | string replace --regex '^-- ?' '')
        return
    end
    for line in ($program __complete $words "$current" 2>/dev/null)
        switch $line
            case ':0'
                __fish_complete_path $current
            case ':*'
            case '*'
                echo $line
        end
    end
end
complete --command tpvpn --no-files --keep-order --arguments '(__tpvpn_complete)'
